"""Slurm's states and reasons: what they mean for a lease, and how to say them to a person.

Source: squeue(1), JOB STATE CODES and JOB REASON CODES.
"""

from isthmus.core.model import EndReason
from isthmus.platforms.platform import AllocationState
from isthmus.platforms.slurm.records import NodeUse

_PENDING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_RUNNING = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"})
SUSPENDED = frozenset({"SUSPENDED", "STOPPED"})  # it stands still where it is
HOLDING = _RUNNING | {"CONFIGURING", "COMPLETING"}  # its resources are not free yet
_ENDED = frozenset(
    {"COMPLETED", "COMPLETING", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "PREEMPTED", "OUT_OF_MEMORY",
     "NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED", "RECONFIG_FAIL", "REVOKED", "GONE"}
)  # fmt: skip
_LOST = frozenset({"NODE_FAIL", "BOOT_FAIL"})
USABLE_NODES = frozenset({"idle", "mixed", "allocated", "completing", "planned"})

_WHY_PENDING = {
    "Resources": "others hold what it needs; it is next",
    "Priority": "jobs of higher priority come first",
    "ReqNodeNotAvail": "its node is down, drained or reserved",
    "Nodes required for job are DOWN": "jobs of higher priority have its nodes, or these are down or drained",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition does not start jobs now",
    "PartitionConfig": "no node of its partition that it may use has what it asks for",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives",
    "PartitionTimeLimit": "its time limit is longer than the partition's; lower slurm.time_limit_s",
    "Licenses": "licences it needs are in use",
    "Reservation": "its reservation has not begun",
    "BeginTime": "its start time has not come",
    "Dependency": "it depends on another job",
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "its user holds it",
    "InvalidAccount": "its account is not valid; see slurm.account",
    "InvalidQOS": "its QoS is not valid; see slurm.qos",
    "NodeDown": "its node is down",
    "None": "the scheduler has not looked at it yet",
}
_LIMITS = ("Assoc", "QOS", "MaxJobs", "MaxCpu", "MaxNode", "MaxMem", "MaxGRES", "MaxTRES")
_WHY_ENDED = {
    "PREEMPTED": "Slurm preempted it for a job of higher priority",
    "CANCELLED": "somebody cancelled it (scancel)",
    "TIMEOUT": "it reached its time limit",
    "DEADLINE": "it reached its deadline",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "OUT_OF_MEMORY": "it went over its memory",
    "FAILED": "it failed",
    "REVOKED": "it was revoked",
    "COMPLETED": "it completed",
    "COMPLETING": "Slurm is ending it",
    "PENDING": "Slurm put it back into the queue",
    "GONE": "Slurm does not know it any more",
}


def allocation_state(state: str) -> AllocationState:
    """A state that we do not know, of a newer Slurm or of a garbled line, ends nothing."""
    if state in _PENDING:
        return "pending"
    return "ended" if state in _ENDED else "running"


def end_reason(state: str) -> EndReason:
    """A node that failed may have run calls to their end; everything else is the owner's right."""
    return EndReason.NODE_LOST if state in _LOST else EndReason.EVICTED


def why_pending(reason: str) -> str:
    """`Resources` -> `others hold what it needs; it is next (Resources)`."""
    code = reason.partition(",")[0].strip("()")
    words = _WHY_PENDING.get(code)
    if words is None:
        words = "a limit of its account or QoS is reached" if code.startswith(_LIMITS) else "Slurm says"
    return f"{words} ({reason})"


def why_closed(use: NodeUse) -> str:
    """`drained: disk is full`"""
    return (
        f"{use.state}: {' '.join(use.reason.split())}" if use.reason else f"{use.state}, Slurm says no reason"
    )


def why_ended(job: int, state: str, reason: str) -> str:
    words = _WHY_ENDED.get(state, "it ended")
    code = state if reason in ("None", "") else f"{state}, {reason}"
    return f"Slurm job {job}: {words} ({code})"
