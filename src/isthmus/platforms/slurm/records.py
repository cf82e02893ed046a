"""What isthmus asks of Slurm and what it hears from it, in whatever way the two speak.

Not here: how a request is rendered (`commands.py`, `rest_shapes.py`) or an answer read (`parsing.py`,
`rest_shapes.py`).
"""

from collections.abc import Mapping

import msgspec

from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import LeaseClass, Record, Resources
from isthmus.core.settings import SlurmPoolSettings, SlurmSettings
from isthmus.core.units import parse_bytes

NEVER_S = float("inf")
_LEASE, _POOL = "isthmus", "isthmus-pool"  # how the comment of a job for a lease, or for a pool, begins
GONE = "GONE"  # the state of a job that Slurm says it does not know


class Job(Record, frozen=True):
    """`state` and `reason` in Slurm's own words; `ends_s` since the epoch, infinite without a limit."""

    job: int
    node: NodeId
    state: str
    reason: str
    cores: int
    memory_bytes: int
    ends_s: float
    comment: str
    licenses: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def is_batch(self) -> bool:
        """No site of isthmus asked for it."""
        return not self.comment.startswith((f"{_LEASE}:", f"{_POOL}:"))


class Waiting(Record, frozen=True):
    """A job that waits in the queue, whoever's it is."""

    job: int
    partition: str
    reason: str
    nodes: int
    cores: int


def new_job(number: int) -> Job:
    """A job that was just submitted: Slurm's scheduler has not looked at it."""
    return Job(
        job=number, node=NodeId(""), state="PENDING", reason="None", cores=0, memory_bytes=0, ends_s=NEVER_S,
        comment="",
    )  # fmt: skip


class BatchJob(Record, frozen=True):
    """A batch job of anybody's; `memory_bytes` on all its nodes, 0 where Slurm does not count memory."""

    job: int
    name: str
    account: str
    qos: str
    nodes: int
    memory_bytes: int


class NodeUse(Record, frozen=True):
    """What a node has, what of it all jobs hold now, and why it is drained or down, in somebody's words."""

    node: NodeId
    state: str
    cores: int
    cores_held: int
    memory_bytes: int
    memory_held_bytes: int
    gpus: int
    gpus_held: int
    features: tuple[str, ...]
    reason: str = ""


class License(Record, frozen=True):
    """`reserved`: kept by reservations."""

    name: str
    total: int
    free: int
    reserved: int = 0


class Program(Record, frozen=True):
    """What runs in a job: the agent.

    environ  secrets among it: never on a command line, which every user of a machine can read
    log      file for the words of whatever starts it; its directory is made where it is missing
    """

    words: tuple[str, ...]
    environ: Mapping[str, str]
    log: str


class JobRequest(Record, frozen=True):
    """One job on one node for one allocation of the site of this name.

    licenses  those of its resources that Slurm counts
    """

    site: str
    allocation: AllocationId
    node: NodeId
    resources: Resources
    lease_class: LeaseClass
    program: Program
    licenses: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def licenses_in_words(self) -> str:
        """`ansys:1,matlab:2`; empty for none."""
        return ",".join(f"{name}:{count}" for name, count in sorted(self.licenses.items()) if count)

    @property
    def name(self) -> str:
        return job_name(self.allocation)

    @property
    def comment(self) -> str:
        """How a job says whose it is; the site finds it again by this after a restart."""
        return f"{_LEASE}:{self.site}:{self.allocation}"

    @property
    def memory_mib(self) -> int:
        return -(-self.resources.memory_bytes // 2**20)

    def partition(self, settings: SlurmSettings) -> str:
        return (self._is_elastic and settings.elastic_partition) or settings.partition

    def qos(self, settings: SlurmSettings) -> str:
        return (self._is_elastic and settings.elastic_qos) or settings.qos

    def gpus(self, settings: SlurmSettings) -> str:
        """`gpu:a100:2`; empty for none."""
        kind = f"{settings.gpu_type}:" if settings.gpu_type else ""
        return f"gpu:{kind}{self.resources.gpus}" if self.resources.gpus else ""

    @property
    def _is_elastic(self) -> bool:
        return self.lease_class is LeaseClass.ELASTIC


class PoolRequest(Record, frozen=True):
    """One job that stands ready, anywhere, for the pool of this name.

    script   one line of shell, which becomes the agent; every user can read it
    environ  secrets among it
    """

    site: str
    pool: str
    shape: SlurmPoolSettings
    script: str
    environ: Mapping[str, str]

    @property
    def name(self) -> str:
        return f"isthmus-pool-{self.pool}"

    @property
    def comment(self) -> str:
        return f"{_POOL}:{self.site}:{self.pool}"

    @property
    def memory_mib(self) -> int:
        return -(-parse_bytes(self.shape.memory) // 2**20)

    @property
    def minutes(self) -> int:
        return -(-self.shape.time_limit_s // 60)

    @property
    def comes_back(self) -> bool:
        """Whether Slurm shall put it into the queue again when it takes it back."""
        return self.shape.contract == "requeue"

    def partition(self, settings: SlurmSettings) -> str:
        return self.shape.partition or settings.elastic_partition or settings.partition

    def qos(self, settings: SlurmSettings) -> str:
        return self.shape.qos or settings.elastic_qos or settings.qos


def job_name(allocation: AllocationId) -> str:
    """One job, one name: it can be cancelled even when the answer with its number was lost."""
    return f"isthmus-{allocation}"


def minutes(settings: SlurmSettings) -> int:
    return -(-settings.time_limit_s // 60)


def allocation_of(job: Job, site: str) -> AllocationId | None:
    """The allocation that a job of this site stands for."""
    allocation = _named(_LEASE, job, site)
    return AllocationId(allocation) if allocation else None


def pool_of(job: Job, site: str) -> str | None:
    """The pool of this site that a job stands ready for."""
    return _named(_POOL, job, site) or None


def _named(kind: str, job: Job, site: str) -> str:
    found, _, rest = job.comment.partition(":")
    owner, _, name = rest.partition(":")
    return name if (found, owner) == (kind, site) else ""
