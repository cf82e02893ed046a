"""Render Slurm's commands: what to run, as lists of words. Pure; understood by Slurm 20.11 and newer.

All output is asked for in explicit formats whose lines end in a mark, so that a line cut short is noticed.
Not here: running them (`running.py`), reading their output (`parsing.py`).
"""

import os
from collections.abc import Mapping, Sequence

from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import LeaseClass, Resources
from isthmus.core.settings import SlurmSettings

MARK = "."  # the last field of every line
SEPARATOR = "|"
JOB_FIELDS = ("%A", "%N", "%T", "%r", "%C", "%m", "%e", "%k")
NODE_FIELDS = ("NodeList", "StateLong", "CPUsState", "Memory", "AllocMem", "Gres", "GresUsed", "Features")
FIELD_WIDTH = 160  # sinfo cuts longer fields; hostnames and GRES are shorter

Command = tuple[str, ...]


def comment_of(site: str, allocation: AllocationId) -> str:
    """How a job says whose it is; the site finds it again by this after a restart."""
    return f"isthmus:{site}:{allocation}"


def job_name(allocation: AllocationId) -> str:
    """One job, one name: it can be cancelled even when the answer with its number was lost."""
    return f"isthmus-{allocation}"


def list_jobs(user: str) -> Command:
    """All jobs of this user, ended ones too, as long as slurmctld remembers them (MinJobAge)."""
    line = SEPARATOR.join((*JOB_FIELDS, MARK))
    return ("squeue", "--noheader", "--all", "--states=all", f"--user={user}", f"--format={line}")


def list_nodes(settings: SlurmSettings) -> Command:
    fields = ",".join(f"{field}:{FIELD_WIDTH}{SEPARATOR}" for field in NODE_FIELDS)
    command = ("sinfo", "--noheader", "--Node", f"--Format={fields}")
    wanted = sorted({name for name in (settings.partition, settings.elastic_partition) if name})
    return (*command, f"--partition={','.join(wanted)}") if settings.partition else command


def show_job(job: int) -> Command:
    return ("scontrol", "--oneliner", "show", "job", str(job))


def cancel_job(job: int) -> Command:
    return ("scancel", str(job))


def cancel_named(user: str, allocation: AllocationId) -> Command:
    return ("scancel", f"--user={user}", f"--name={job_name(allocation)}")


def allocate(
    settings: SlurmSettings,
    site: str,
    allocation: AllocationId,
    node: NodeId,
    resources: Resources,
    lease_class: LeaseClass,
) -> Command:
    """Take resources on one node without starting anything there."""
    is_elastic = lease_class is LeaseClass.ELASTIC
    partition = (is_elastic and settings.elastic_partition) or settings.partition
    qos = (is_elastic and settings.elastic_qos) or settings.qos
    options = {
        "partition": partition,
        "qos": qos,
        "account": settings.account,
        "constraint": settings.constraint,
        "reservation": settings.reservation,
        "gres": _gres(settings, resources),
    }
    return (
        "salloc",
        "--no-shell",
        f"--job-name={job_name(allocation)}",
        f"--comment={comment_of(site, allocation)}",
        f"--nodelist={node}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={resources.cores}",
        f"--mem={_megabytes(resources)}M",
        f"--time={-(-settings.time_limit_s // 60)}",
        *(f"--{name}={value}" for name, value in options.items() if value),
    )


def start_step(job: int, resources: Resources, program: Sequence[str]) -> Command:
    """Run a program inside an allocation, with all that the allocation has. It ends with the step."""
    return (
        "srun",
        f"--jobid={job}",
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={resources.cores}",
        "--mem=0",
        "--input=none",
        "--quiet",
        "--chdir=/",
        "--job-name=isthmus-agent",
        *program,
    )


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """For all commands: times as seconds since the epoch, English words, and no options from elsewhere."""
    foreign = ("SALLOC_", "SBATCH_", "SCANCEL_", "SINFO_", "SQUEUE_", "SLURM_")
    kept = {
        name: value for name, value in environ.items() if name == "SLURM_CONF" or not name.startswith(foreign)
    }
    return {**kept, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C.UTF-8"}


def _gres(settings: SlurmSettings, resources: Resources) -> str:
    return (
        f"gpu:{settings.gpu_type + ':' * bool(settings.gpu_type)}{resources.gpus}" if resources.gpus else ""
    )


def _megabytes(resources: Resources) -> int:
    return -(-resources.memory_bytes // 2**20)
