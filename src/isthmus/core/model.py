"""The nouns that every part shares: resources, environments, leases, nodes. Frozen, comparable, serialisable.

Not here: what travels between parts (`core.api` for REST, `node.messages` for agents).
"""

import enum
import hashlib
import sys
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from isthmus.core.ids import AllocationId, EnvironmentId, ExecutorId, LeaseId, NodeId, TenantId
from isthmus.core.kinds import COUNT_MAX, Asked, HeldBy
from isthmus.core.units import parse_bytes

ISTHMUS_VERSION = "0.1.0"
MEMORY_BYTES_MAX = 2**56
ENVIRONMENT_CHARACTERS_MAX = 48 * 2**10  # fits into one packet to an executor, and one argument of a process
WINDOW_H_MAX = 24 * 31  # over which core-hours are counted


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all shared structs: immutable, named fields, no unknown fields accepted."""


class Resources(Asked, frozen=True):
    """What one lease holds on one node, and of what the site has in all.

    cores     whole cores, >= 1
    memory    bytes, as text with a unit or as an int
    gpus      whole GPUs

    and of further kinds (`kinds.Asked`), by name:
    bandwidth  bits per second that leave the node, as text like "2Gbit/s" or as an int
    cache      bytes on the node's own disk, as text like "200GiB" or as an int
    licenses   {name: how many}, site-wide
    """

    cores: int = 1
    memory: str | int = "1GiB"
    gpus: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.cores <= COUNT_MAX or not 0 <= self.gpus <= COUNT_MAX:
            raise ValueError(f"resources need at least 1 core and no negative GPUs, got {self}")
        if parse_bytes(self.memory) > MEMORY_BYTES_MAX:
            raise ValueError(f"memory={self.memory!r} is more than any machine has")
        if parse_bytes(self.memory) < 16 * 2**20:
            raise ValueError(
                f"memory={self.memory!r} is too small for a Python process; ask for at least 16MiB"
            )

    def __hash__(self) -> int:  # a dict has none
        return hash((self.cores, self.memory, self.gpus, *sorted(self.amounts.items())))

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory)


class Environment(Record, frozen=True):
    """Where a function's code runs: an interpreter, what it can import, what is imported before the fork.

    python        path of the interpreter; "" means the agent's own
    sys_path      extra import directories of the caller (same machine or shared file system)
    requirements  pip requirement lines, no options; if any, a cached virtual environment named by its hash
    preload       modules the zygote imports once, so that every executor starts with them
    """

    python: str = ""
    sys_path: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("sys_path", "requirements", "preload"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name}={value!r} is one text; write a tuple of them, {name}=({value!r},)")
        options = [line for line in self.requirements if line.lstrip().startswith("-")]
        if options:
            raise ValueError(f"requirements name packages; {options[0]!r} is an option of pip")
        words = (self.python, *self.sys_path, *self.requirements, *self.preload)
        if sum(map(len, words)) + len(words) > ENVIRONMENT_CHARACTERS_MAX:
            raise ValueError(f"an environment has at most {ENVIRONMENT_CHARACTERS_MAX} characters in all")

    @property
    def id(self) -> EnvironmentId:
        digest = hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=8).hexdigest()
        return EnvironmentId(f"env_{digest}")


class LeaseClass(enum.StrEnum):
    RESERVED = "reserved"
    ELASTIC = "elastic"
    HARVESTED = "harvested"


class LeaseState(enum.StrEnum):
    REQUESTED = "requested"
    GRANTED = "granted"
    STARTING = "starting"
    ACTIVE = "active"
    DRAINING = "draining"
    ENDED = "ended"


class EndReason(enum.StrEnum):
    RELEASED = "released"  # by its owner
    EXPIRED = "expired"  # nobody renewed it
    IDLE = "idle"  # its pool scaled down
    EVICTED = "evicted"  # policy, quota or the node's owner took it back
    CANCELLED = "cancelled"  # the request was withdrawn before the grant
    FAILED = "failed"  # it could not be started, or its executor kept dying
    EXITED = "exited"  # the function ended the process; detail has the exit code or signal
    KILLED = "killed"  # SIGKILL, or a death that nobody saw: hardly the function's own doing
    OUT_OF_MEMORY = "out_of_memory"
    NODE_LOST = "node_lost"
    SITE_STOPPED = "site_stopped"


class Enforcement(Record, frozen=True):
    """What really holds each limit of a lease. `accounted-only` means: measured, not enforced.

    amounts  of the further kinds that a lease holds, or a node has; `tc-htb`: the kernel's shaper holds what
             leaves by one interface; `loop-mount`: a file system of that size; `slurm`: Slurm counts them for
             all of its jobs
    """

    cores: Literal["cpuset", "cpu-quota", "affinity", "accounted-only"] = "accounted-only"
    memory: Literal["cgroup", "rlimit", "accounted-only"] = "accounted-only"
    mechanism: Literal["cgroup-v2", "cgroup-v1", "systemd", "none"] = "none"
    detail: str = ""
    amounts: dict[str, HeldBy] = {}


class Usage(Record, frozen=True):
    """What a lease used so far. Times in seconds, memory in bytes; all counters only grow, except rss.

    allocated_core_s  cores held x wall time;  busy_s: inside functions;  spin_s: polling the fabric
    """

    allocated_core_s: float = 0.0
    cpu_s: float = 0.0
    busy_s: float = 0.0
    spin_s: float = 0.0
    rss_bytes: int = 0
    rss_bytes_max: int = 0
    calls: int = 0
    errors: int = 0


class ExecutorInfo(Record, frozen=True):
    """One process that runs functions under a lease; `address` is `unix:PATH` or `tcp://HOST:PORT`."""

    executor: ExecutorId
    address: str
    pid: int


class ExecutorEnd(Record, frozen=True):
    """How one executor of a lease that goes on died; `detail` as in "signal SIGSEGV"."""

    executor: ExecutorId
    reason: "EndReason"
    detail: str


class Lease(Record, frozen=True):
    """The right of one tenant to a bundle of resources on one node until `deadline_s` (epoch seconds)."""

    lease: LeaseId
    tenant: TenantId
    resources: Resources
    lease_class: LeaseClass
    environment: Environment
    state: LeaseState
    pool: str = "default"
    node: NodeId | None = None
    allocation: AllocationId | None = None
    agent: NodeId | None = None  # the agent that serves only its allocation; None: its node's
    executors: tuple[ExecutorInfo, ...] = ()
    lost_executors: tuple[ExecutorEnd, ...] = ()  # the latest of those that died without an order
    deadline_s: float = 0.0
    created_s: float = 0.0
    ended_s: float = 0.0
    end_reason: EndReason | None = None
    end_detail: str = ""
    parent: LeaseId | None = None
    labels: dict[str, str] = {}
    enforcement: Enforcement = Enforcement()
    usage: Usage = Usage()
    price: float = 0.0  # of what it held so far, in the site's currency

    @property
    def orders_to(self) -> NodeId | None:
        """The agent that carries out orders for this lease."""
        return self.agent or self.node


LENT_PLATFORM = "lent"  # of nodes that are the idle part of a batch job: for harvested leases, and only those
POOL_PLATFORM = (
    "pool"  # of nodes that are an allocation standing ready with its agent: for elastic leases only
)


class Node(Record, frozen=True):
    """A machine that can host leases. `cores`/`memory_bytes`/`gpus`/`amounts` are what isthmus may use of it.

    agent         `on-demand`: each allocation brings its own agent, so none need be there before
    other_*       what of it others hold now (batch jobs), so that it is not free
    """

    node: NodeId
    platform: str
    cores: int
    memory_bytes: int
    gpus: int = 0
    labels: dict[str, str] = {}
    agent: Literal["connected", "silent", "none", "on-demand"] = "none"
    draining: bool = False  # gets no new leases: an operator asked for it
    draining_why: str = ""  # in the platform's words, if it was asked there
    other_cores: int = 0
    other_memory_bytes: int = 0
    other_gpus: int = 0
    enforcement: Enforcement = Enforcement()
    amounts: dict[str, int] = {}


def python_version() -> str:
    """The version two processes must share to exchange code: `cpython-3.11`."""
    return f"{sys.implementation.name}-{sys.version_info.major}.{sys.version_info.minor}"


class Quota(Asked, frozen=True, kw_only=True):
    """What one tenant may hold at once, and use within any `window_h` hours. 0 means no limit."""

    cores: Annotated[int, Meta(ge=0, le=COUNT_MAX)] = 0
    memory_bytes: Annotated[int, Meta(ge=0, le=MEMORY_BYTES_MAX)] = 0
    gpus: Annotated[int, Meta(ge=0, le=COUNT_MAX)] = 0
    leases: Annotated[int, Meta(ge=0, le=COUNT_MAX)] = 0
    core_hours: Annotated[float, Meta(ge=0)] = 0.0
    window_h: Annotated[int, Meta(ge=1, le=WINDOW_H_MAX)] = 24


class Principal(Record, frozen=True):
    """Who is asking: the tenant and role that an API key (or a lease token: role `lease`) stands for."""

    tenant: TenantId
    role: Literal["admin", "operator", "user", "lease"] = "user"
    name: str = ""
    quota: Quota = Quota()
    lease: LeaseId | None = None  # role `lease`: the only lease it may touch (nested calls)
