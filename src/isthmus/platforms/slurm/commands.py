"""Render Slurm's commands: what to run, as lists of words. Pure; understood by Slurm 20.11 and newer.

All output is asked for in explicit formats whose lines end in a mark, so that a line cut short is noticed.
Not here: running them (`running.py`), reading their output (`parsing.py`).
"""

import os
from collections.abc import Mapping, Sequence

from isthmus.core.ids import AllocationId
from isthmus.core.model import Resources
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm.records import BatchJob, JobRequest, PoolRequest, job_name, minutes

MARK = "."  # the last field of every line
SEPARATOR = "|"
JOB_FIELDS = ("%A", "%N", "%T", "%r", "%C", "%m", "%e", "%W", "%k")
QUEUE_FIELDS = ("%A", "%P", "%D", "%C", "%r")  # none that a user words: others' jobs are in it
NODE_FIELDS = (
    "NodeList", "StateLong", "CPUsState", "Memory", "AllocMem", "Gres", "GresUsed", "Features", "Reason"
)  # fmt: skip
FIELD_WIDTH = 160  # sinfo cuts longer fields; hostnames and GRES are shorter

Command = tuple[str, ...]


def list_jobs(user: str) -> Command:
    """All jobs of this user, ended ones too, as long as slurmctld remembers them (MinJobAge)."""
    line = SEPARATOR.join((*JOB_FIELDS, MARK))
    return ("squeue", "--noheader", "--all", "--states=all", f"--user={user}", f"--format={line}")


def list_queue() -> Command:
    """What waits, of all users."""
    line = SEPARATOR.join((*QUEUE_FIELDS, MARK))
    return ("squeue", "--noheader", "--all", "--states=PENDING", f"--format={line}")


def list_nodes(settings: SlurmSettings) -> Command:
    fields = ",".join(f"{field}:{FIELD_WIDTH}{SEPARATOR}" for field in NODE_FIELDS)
    command = ("sinfo", "--noheader", "--Node", f"--Format={fields}")
    wanted = sorted({name for name in (settings.partition, settings.elastic_partition) if name})
    return (*command, f"--partition={','.join(wanted)}") if settings.partition else command


def show_diagnostics() -> Command:
    """Its first lines have slurmctld's clock; all other times are told as the client's own clock goes."""
    return ("sdiag",)


def list_licenses() -> Command:
    return ("scontrol", "--oneliner", "show", "licenses")


def show_job(job: int) -> Command:
    return ("scontrol", "--oneliner", "show", "job", str(job))


def cancel_job(job: int) -> Command:
    return ("scancel", str(job))


def cancel_named(user: str, allocation: AllocationId) -> Command:
    return ("scancel", f"--user={user}", f"--name={job_name(allocation)}")


def list_partitions() -> Command:
    return ("sinfo", "--noheader", "--format=%R")


def show_configuration() -> Command:
    return ("scontrol", "show", "config")


def ping() -> Command:
    return ("scontrol", "ping")


def allocate(settings: SlurmSettings, request: JobRequest) -> Command:
    """Take resources on one node without starting anything there."""
    options = {
        "partition": request.partition(settings),
        "qos": request.qos(settings),
        "account": settings.account,
        "constraint": settings.constraint,
        "reservation": settings.reservation,
        "gres": request.gpus(settings),
        "licenses": request.licenses_in_words,
    }
    return (
        "salloc",
        "--no-shell",
        f"--job-name={request.name}",
        f"--comment={request.comment}",
        f"--nodelist={request.node}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={request.resources.cores}",
        f"--mem={request.memory_mib}M",
        f"--time={minutes(settings)}",
        *(f"--{name}={value}" for name, value in options.items() if value),
    )


def submit(settings: SlurmSettings, request: PoolRequest) -> Command:
    """A batch job of one task on any one node."""
    options = {
        "partition": request.partition(settings),
        "qos": request.qos(settings),
        "account": settings.account,
        "constraint": settings.constraint,
        "reservation": settings.reservation,
    }
    return (
        "sbatch",
        "--parsable",
        f"--job-name={request.name}",
        f"--comment={request.comment}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={request.shape.cores}",
        f"--mem={request.memory_mib}M",
        f"--time={request.minutes}",
        "--requeue" if request.comes_back else "--no-requeue",
        "--chdir=/",
        "--output=/dev/null",
        *(f"--{name}={value}" for name, value in options.items() if value),
        f"--wrap={request.script}",
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


def show_script(job: int) -> Command:
    return ("scontrol", "write", "batch_script", str(job), "-")


def join_job(job: BatchJob, program: Sequence[str]) -> Command:
    """Run a program once on each node of a job, beside all else there, with all that the job has."""
    count = f"{job.nodes}"
    shape = (f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--mem=0")
    quiet = ("--input=none", "--quiet", "--chdir=/", "--job-name=isthmus-lend")
    return ("srun", f"--jobid={job.job}", "--overlap", *shape, *quiet, *program)


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """For all commands: times as seconds since the epoch, English words, and no options from elsewhere."""
    foreign = ("SALLOC_", "SBATCH_", "SCANCEL_", "SINFO_", "SQUEUE_", "SLURM_")
    kept = {
        name: value for name, value in environ.items() if name == "SLURM_CONF" or not name.startswith(foreign)
    }
    return {**kept, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C.UTF-8"}
