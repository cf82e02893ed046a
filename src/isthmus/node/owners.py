"""What a batch job holds on this node, and what it uses: the owner of the cores that harvested leases borrow.

Its processes are those in the job's cgroup (`job_NUMBER`, both versions, as Slurm names it) or, where the
batch system makes none, those that carry its number in their environment. What isthmus runs inside the job
says so in its own environment (LENT) and is not the owner. CPU time is read from /proc per thread, in
nanoseconds.

Reads only. Limit: a process that hides its environment from us (another user's, a cleared one) is not seen
without a cgroup; it still gets its core at once, by the kernel (`idling.py`), and shows as pressure
(`slack.py`).
"""

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from isthmus.core.model import Record
from isthmus.core.units import format_bytes, parse_bytes
from isthmus.node import processes
from isthmus.node.isolation import groups

LENT = "LENT_TO_ISTHMUS"  # in the environment of all that isthmus runs inside a lent job
SAMPLES = 4  # kept: three spans between them
FINDS_TRUSTED = 10  # looks for processes in a row in which a number that is still there is the same process
_MIB = 2**20


class Lent(Record, frozen=True):
    """What a job lends of what it holds on one node.

    cores, memory_bytes   at most so much of it
    held_bytes            the memory that it holds here
    user ... qos          the owner's and the job's, for rules
    """

    job: str
    node: str
    cores: int
    memory_bytes: int
    held_bytes: int
    user: str = ""
    partition: str = ""
    account: str = ""
    name: str = ""
    qos: str = ""


class Use(NamedTuple):
    """`cores`: time that its threads ran or waited for a core, per time since the sample before."""

    cores: float
    memory_bytes: int


def lent_by(environ: Mapping[str, str], cores: str, memory: str) -> Lent:
    """What the job that this environment belongs to lends.

    cores, memory  `auto`: all that the job holds here; else a number of cores, a size
    raises         ValueError outside of a job, or for more than it holds
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        raise ValueError("SLURM_JOB_ID is not set: only inside a Slurm job can be lent what the job holds")
    held_cores = int(environ.get("SLURM_CPUS_ON_NODE") or len(os.sched_getaffinity(0)))
    held_bytes = _held_memory_bytes(environ, held_cores)
    lent_cores = held_cores if cores == "auto" else int(cores)
    lent_bytes = held_bytes if memory == "auto" else parse_bytes(memory)
    if not 1 <= lent_cores <= held_cores or lent_bytes > held_bytes:
        held = f"{held_cores} cores and {format_bytes(held_bytes)}"
        raise ValueError(f"job {job} holds {held} here; it cannot lend cores={cores} memory={memory}")
    return Lent(
        job=job,
        node=environ.get("SLURMD_NODENAME") or os.uname().nodename,
        cores=lent_cores,
        memory_bytes=lent_bytes,
        held_bytes=held_bytes,
        user=environ.get("SLURM_JOB_USER", ""),
        partition=environ.get("SLURM_JOB_PARTITION", ""),
        account=environ.get("SLURM_JOB_ACCOUNT", ""),
        name=environ.get("SLURM_JOB_NAME", ""),
        qos=environ.get("SLURM_JOB_QOS", ""),
    )


def _held_memory_bytes(environ: Mapping[str, str], cores: int) -> int:
    """Slurm says it in MiB, per node or per core; 0 and nothing mean all of the node."""
    whole = int(environ.get("SLURM_MEM_PER_NODE") or 0) or cores * int(environ.get("SLURM_MEM_PER_CPU") or 0)
    return whole * _MIB or processes.memory_total_bytes()


class Owner:
    """Samples one job. Holds the counters of the sample before, so one reader only."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._mark = f"SLURM_JOB_ID={job}".encode()
        self._known: dict[int, tuple[int, bool]] = {}  # pid -> its start, whether it is the owner's
        self._finds = 0
        self._members: list[int] = []
        self._wants_ns: dict[int, int] = {}
        self._series: deque[tuple[int, int]] = deque(maxlen=SAMPLES)  # (when, all that was wanted until then)

    def find(self) -> None:
        """Look for its processes anew. Costs two reads per process that was not there before, and now and
        then one per process: a number may have been given again."""
        group = job_group(self._job)
        candidates = group_members(group) if group is not None else _all_processes()
        is_trusting = self._finds % FINDS_TRUSTED != 0
        self._finds += 1
        known: dict[int, tuple[int, bool]] = {}
        for pid in candidates:
            before = self._known.get(pid)
            if before is None or not is_trusting:
                started = processes.start_ticks(pid)
                if before is None or before[0] != started:
                    before = (started, self._is_owner(pid, group is not None))
            known[pid] = before
        self._known = known
        self._members = [pid for pid, (_, is_owner) in known.items() if is_owner]

    def sample(self, now_ns: int) -> Use:
        """What it used since the sample before; threads that ended meanwhile count for nothing."""
        wants_ns: dict[int, int] = {}
        for pid in self._members:
            wants_ns.update(thread_wants_ns(pid))
        before, self._wants_ns = self._wants_ns, wants_ns
        last_ns, wanted_ns = self._series[-1] if self._series else (now_ns, 0)
        for thread, spent_ns in wants_ns.items():
            is_known = thread in before
            wanted_ns += spent_ns - before[thread] if is_known else min(spent_ns, now_ns - last_ns)
        self._series.append((now_ns, wanted_ns))
        return Use(self._cores(), sum(processes.rss_bytes(pid) for pid in self._members))

    def _cores(self) -> float:
        """Of the last sample, or of the last few if they say more: a thread's wait is only counted when it
        has ended, so one sample may miss what the next has twice."""
        final_ns, wanted_ns = self._series[-1]
        earlier = (self._series[0], self._series[max(0, len(self._series) - 2)])
        rates = [(wanted_ns - before) / (final_ns - at_ns) for at_ns, before in earlier if final_ns > at_ns]
        return max(rates, default=0.0)

    def _is_owner(self, pid: int, is_in_group: bool) -> bool:
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return is_in_group
        is_ours = any(variable.startswith(LENT.encode() + b"=") for variable in variables)
        return not is_ours and (is_in_group or self._mark in variables)


def thread_wants_ns(pid: int) -> dict[int, int]:
    """{thread: how long it ran or was ready to}; empty when the process is gone.

    What waits counts: where others press too, an owner that gets little is not one that wants little.
    source   proc(5), schedstat: time on a core, time in the queue
    """
    spent: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:
                ran, waited, _ = file.read().split()
                spent[int(thread)] = int(ran) + int(waited)
    return spent


def job_group(job: str, own: str | None = None, mounts: Mapping[str, Path] | None = None) -> Path | None:
    """The cgroup of the job that this process runs in, if the batch system made one.

    own     /proc/self/cgroup
    mounts  as `groups.mounts` gives them
    """
    text = Path("/proc/self/cgroup").read_text() if own is None else own
    where = groups.mounts() if mounts is None else mounts
    for line in text.splitlines():
        _, names, path = line.split(":", 2)
        head, found, _ = f"{path}/".partition(f"/job_{job}/")
        mount = next((where[name] for name in names.split(",") if name in where), None)
        if found and mount is not None:
            return mount / head.lstrip("/") / f"job_{job}"
    return None


def group_members(group: Path) -> set[int]:
    """All processes in a cgroup and the groups below it."""
    return {pid for directory, _, _ in os.walk(group) for pid in groups.pids(Path(directory))}


def _all_processes() -> Iterable[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())
