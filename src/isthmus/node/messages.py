"""What the site and a node's agent say to each other over one WebSocket that the agent dials.

Each message is one msgpack-encoded tagged struct. Orders carry a `number`; the agent answers each with `Done`
or `Failed` of the same number, in any order. Orders are idempotent: repeating one changes nothing and gives
the same answer. Reports are unasked for and may repeat.

Authentication is mutual: both sides prove they hold the agent's key by an HMAC over the other's nonce
(`Challenge` -> `AgentHello` -> `SiteHello`) before anything else is accepted.
"""

import msgspec

from isthmus.core.ids import ExecutorId, LeaseId, NodeId, TenantId
from isthmus.core.model import EndReason, Enforcement, Environment, ExecutorInfo, LeaseClass, Resources, Usage
from isthmus.node.owners import Lent
from isthmus.node.slack import Slack


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


# handshake --------------------------------------------------------------------------------------------------
class Challenge(Message, frozen=True):
    """Site -> agent, first."""

    nonce: bytes


class RunningLease(msgspec.Struct, frozen=True, kw_only=True):
    """A lease that survived its agent's or its site's death, offered for re-adoption."""

    lease: LeaseId
    executors: tuple[ExecutorInfo, ...]
    deadline_s: float
    usage: Usage


class AgentHello(Message, frozen=True):
    """Agent -> site: proof = HMAC-SHA256(agent's key, b"agent" + site nonce + agent nonce)."""

    node: NodeId
    nonce: bytes
    proof: bytes
    version: str
    python: str
    hostname: str
    pid: int
    cores: int
    memory_bytes: int
    gpus: int
    enforcement: Enforcement
    running: tuple[RunningLease, ...] = ()
    lent: Lent | None = None  # the node is part of a batch job, and takes harvested leases only
    now_s: float = 0.0  # by the node's clock


class SiteHello(Message, frozen=True):
    """Site -> agent: proof = HMAC-SHA256(agent's key, b"site" + agent nonce + site nonce)."""

    proof: bytes
    orphan_s: float  # how long leases outlive their deadline while the site cannot be reached


# orders -----------------------------------------------------------------------------------------------------
class Order(Message, frozen=True):
    number: int


class StartLease(Order, frozen=True):
    """Enforce the lease and start its first executor. Answer: Done with one ExecutorInfo.

    now_s  the site's clock as it gives the order: the node's may differ, so only the time between counts
    """

    lease: LeaseId
    tenant: TenantId
    resources: Resources
    lease_class: LeaseClass
    environment: Environment
    lease_key: bytes
    now_s: float
    deadline_s: float


class AddExecutor(Order, frozen=True):
    """One more executor inside a running lease (nested calls). Answer: Done with the new ExecutorInfo."""

    lease: LeaseId


class RenewLease(Order, frozen=True):
    """now_s: as in StartLease."""

    lease: LeaseId
    now_s: float
    deadline_s: float


class DrainLease(Order, frozen=True):
    """Admit no further calls; running ones may end within grace_s, then EndLease follows from the site."""

    lease: LeaseId
    grace_s: float


class EndLease(Order, frozen=True):
    """Stop its executors (SIGTERM, SIGKILL after grace_s), free its cgroup and files. Unknown: Done."""

    lease: LeaseId
    reason: EndReason
    grace_s: float = 0.0


class KillExecutor(Order, frozen=True):
    """SIGKILL one executor at once: the forceful half of cancel."""

    lease: LeaseId
    executor: ExecutorId


class ReadLog(Order, frozen=True):
    """Answer: Done with `text` and `next_offset`."""

    lease: LeaseId
    offset: int
    limit_bytes: int = 65536


class Warm(Order, frozen=True):
    """Keep `spares` forked, unassigned executors of this environment ready. 0 stops its zygote when idle."""

    environment: Environment
    spares: int


DISMISSED = 4001  # the WebSocket's close code for the agent of an allocation that is over: it ends itself


# answers ----------------------------------------------------------------------------------------------------
class Done(Message, frozen=True):
    number: int
    executor: ExecutorInfo | None = None
    enforcement: Enforcement | None = None
    text: str = ""
    next_offset: int = 0
    killed: bool = False


class Failed(Message, frozen=True):
    """`code` is a class name in core.errors."""

    number: int
    code: str
    message: str


# reports ----------------------------------------------------------------------------------------------------
class FunctionUse(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one function on one executor since that executor started."""

    name: str
    calls: int
    errors: int
    busy_s: float
    last_s: float


class LeaseReport(msgspec.Struct, frozen=True, kw_only=True):
    lease: LeaseId
    usage: Usage
    idle_s: float  # since the last call ended; 0 while one runs, or an actor or a stream lives
    draining: bool = False  # its executors admit no further call
    functions: tuple[FunctionUse, ...] = ()


class Heartbeat(Message, frozen=True):
    """Every meter interval, and when slack has changed. Silence for leasing.agent_silence_s makes the node
    `silent`."""

    leases: tuple[LeaseReport, ...]
    slack: Slack | None = None  # where a job lends: what of it idles now, harvested leases not counted


class ExecutorEnded(Message, frozen=True):
    """An executor died without an order. detail: "exit code 3" or "signal SIGSEGV".

    The lease ends with it when it was the lease's last one.
    """

    lease: LeaseId
    executor: ExecutorId
    reason: EndReason  # EXITED, KILLED or OUT_OF_MEMORY
    detail: str


class LeaseEnded(Message, frozen=True):
    """All of a lease is gone from the node. Sent after EndLease too, with final usage and counts; repeated
    until the site has seen it (the agent re-sends on reconnect what it ended while cut off)."""

    lease: LeaseId
    reason: EndReason
    detail: str
    usage: Usage
    functions: tuple[FunctionUse, ...] = ()


AnyMessage = (
    Challenge
    | AgentHello
    | SiteHello
    | StartLease
    | AddExecutor
    | RenewLease
    | DrainLease
    | EndLease
    | KillExecutor
    | ReadLog
    | Warm
    | Done
    | Failed
    | Heartbeat
    | ExecutorEnded
    | LeaseEnded
)

MESSAGE_BYTES_MAX = 4 * 2**20
_DECODER = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Raises msgspec.MsgspecError (DecodeError or ValidationError) for anything that is no message."""
    try:
        message: AnyMessage = _DECODER.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"text that is not UTF-8, or nested too deep: {error}") from error
    return message
