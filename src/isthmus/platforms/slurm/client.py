"""The one seam to Slurm: what a platform asks of it, whatever way it is spoken to.

    SlurmClient ── CommandClient   squeue, sinfo, salloc, srun, scancel   (`command_client.py`)
                │    over RunningHere   on this machine                   (`running.py`)
                │    over RunningBySsh  on a login node                   (`ssh.py`)
                └─ RestClient      slurmrestd with JWT                    (`rest_client.py`)

Invariant: what cannot be told raises SiteUnavailableError and is never taken for "gone" or "none". Every
client passes tests/live/slurm/test_slurm_clients.py on a real cluster.
"""

from collections.abc import Mapping
from typing import Protocol

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import AllocationId
from isthmus.platforms.slurm.records import (
    BatchJob,
    Job,
    JobRequest,
    License,
    NodeUse,
    PoolRequest,
    Program,
    Waiting,
)


class RefusedError(SiteUnavailableError):
    """Slurm was reached and said no; the message has its words."""


class Started(Protocol):
    async def wait(self) -> int:
        """Exit code of the program. Raises SiteUnavailableError when nobody can tell any more."""
        ...


class JobSteps(Protocol):
    """What only commands can: look into a job of our user, and join it. Raises SiteUnavailableError."""

    async def script(self, job: int) -> str:
        """Empty for a job without one."""
        ...

    async def describe(self, job: int) -> BatchJob: ...

    async def join(self, job: BatchJob, program: Program) -> Started:
        """Run a program on each node of the job, beside what runs there, so that it survives us."""
        ...


class SlurmClient(Protocol):
    """All calls raise SiteUnavailableError when Slurm does not answer, or not in time, or not readably."""

    @property
    def steps(self) -> JobSteps | None: ...

    place: str
    """Where it speaks to Slurm, for people: `here`, `login1 by SSH`, `slurmrestd at ...`."""

    async def jobs(self) -> tuple[Job, ...]:
        """All jobs of our user, ended ones too, as long as Slurm remembers them."""
        ...

    async def queue(self) -> tuple[Waiting, ...]:
        """What waits, of all users as far as they are shown to us."""
        ...

    async def nodes(self) -> tuple[NodeUse, ...]:
        """Of our partitions, each once; of all where none is set."""
        ...

    async def clock_s(self) -> float:
        """slurmctld's time of day, in seconds since the epoch; the times of jobs are told in it."""
        ...

    async def licenses(self) -> tuple[License, ...]:
        """All that Slurm counts."""
        ...

    async def state(self, job: int) -> tuple[str, str]:
        """(state, reason) in Slurm's words, GONE for an unknown job; PREEMPTED once Slurm has begun to."""
        ...

    async def take(self, request: JobRequest) -> int:
        """The number of a job that runs. Waits in the queue until cancelled, and then withdraws the job as
        far as it can; `cancel_named` makes sure. Raises RefusedError.
        """
        ...

    async def submit(self, request: PoolRequest) -> int:
        """The number of a batch job, which waits in the queue as long as it likes. Raises RefusedError."""
        ...

    async def start(self, job: int, request: JobRequest) -> Started:
        """Run the request's program in the job, so that it survives us."""
        ...

    async def cancel(self, job: int) -> None: ...

    async def cancel_named(self, allocation: AllocationId) -> None:
        """Whatever job goes by the allocation's name, known to us or not."""
        ...

    async def remove(self, directory: str) -> None:
        """What a program has left behind, where we can reach it."""
        ...

    async def partitions(self) -> frozenset[str]: ...

    async def ping(self) -> str:
        """Which controllers answer, in Slurm's words."""
        ...

    async def configuration(self) -> Mapping[str, str]:
        """Slurm's, as far as it is told; may be empty."""
        ...

    async def close(self) -> None: ...
