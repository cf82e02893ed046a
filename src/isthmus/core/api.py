"""What travels over the site's REST interface. `gateway` serves it; `sdk` and `cli` speak it.

Bodies are JSON of these structs, except durable calls and results, whose payloads are msgpack (bytes inside).
Errors are `{"error": ErrorBody}`; `code` is the class name in `core.errors`.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from isthmus.core.ids import CallId, ExecutorId, KeyId, LeaseId, NodeId, RequestId, TenantId
from isthmus.core.model import (
    Enforcement,
    Environment,
    ExecutorInfo,
    LeaseClass,
    Record,
    Resources,
)

Name = Annotated[str, Meta(max_length=1000)]
Labels = Annotated[dict[Annotated[str, Meta(max_length=200)], Name], Meta(max_length=64)]


class ErrorBody(Record, frozen=True):
    code: str
    message: str
    retryable: bool = False


class LeaseRequest(Record, frozen=True):
    """POST /v1/leases. `count` leases, each of `resources`; `together`: all or none (group start).

    wait_s   how long the site may keep the request waiting for capacity before it answers NoCapacityError
    parent   set by nested calls; quota counts them under the parent
    """

    resources: Resources = Resources()
    lease_class: LeaseClass = LeaseClass.ELASTIC
    environment: Environment = Environment()
    pool: Name = "default"
    count: int = 1
    together: bool = False
    wait_s: float = 0.0
    policy: Name = ""  # a hint the rules can match, as given to @isthmus.function(policy=...)
    function: Name = ""  # the function's name, for rules and for `explain`
    parent: LeaseId | None = None
    labels: Labels = msgspec.field(default_factory=dict)


class Grant(Record, frozen=True):
    """A lease that is active: connect to an executor's address with the token.

    lease_s  its life without renewal, in seconds; renew at a third of it
    open_s   for so long it takes calls: its allocation's time ends then; 0: nobody knows of an end
    """

    lease: LeaseId
    node: NodeId
    executors: tuple[ExecutorInfo, ...]
    token: str
    deadline_s: float
    lease_s: float
    lease_class: LeaseClass
    enforcement: Enforcement
    open_s: float = 0.0


class LeaseReply(Record, frozen=True):
    request: RequestId
    grants: tuple[Grant, ...]
    explanation: str = ""  # in one line, when fewer were granted than asked


class RenewRequest(Record, frozen=True):
    """POST /v1/leases/renew"""

    leases: Annotated[tuple[LeaseId, ...], Meta(max_length=10_000)]


class Renewal(Record, frozen=True):
    """`ok=False`: the lease is over; `reason` is an EndReason."""

    lease: LeaseId
    ok: bool
    deadline_s: float = 0.0
    token: str = ""
    draining: bool = False
    reason: str = ""
    detail: str = ""


class RenewReply(Record, frozen=True):
    renewals: tuple[Renewal, ...]


class ExecutorReply(Record, frozen=True):
    """POST /v1/leases/{lease}/executors: one more executor inside the same lease, for nested calls."""

    executor: ExecutorInfo
    token: str


class FunctionSummary(Record, frozen=True):
    """GET /v1/functions, one row per function seen by this tenant's executors."""

    name: str
    calls: int
    errors: int
    busy_s: float
    last_s: float


class DurableCall(Record, frozen=True):
    """POST /v1/calls, msgpack. The site stores and relays these bytes; it never unpickles them.

    function_code, arguments   as `fabric.codec` encoded them; only the tenant's executor decodes them
    idempotency_key            the same key from the same tenant names the same call, whatever the bytes
    """

    function_name: str
    function_kind: str
    function_code: bytes
    arguments_meta: bytes
    arguments_data: bytes
    resources: Resources = Resources()
    lease_class: LeaseClass = LeaseClass.ELASTIC
    environment: Environment = Environment()
    policy: Name = ""
    idempotency_key: str = ""
    timeout_s: float = 0.0
    retries: int = 0


CallState = Literal["queued", "running", "done", "failed", "cancelled"]


class CallSummary(Record, frozen=True):
    """GET /v1/calls, one row per durable call."""

    call: CallId
    function: str
    state: CallState
    attempts: int
    created_s: float
    ended_s: float = 0.0
    lease: LeaseId | None = None
    detail: str = ""


class CallResult(Record, frozen=True):
    """GET /v1/calls/{call}/result, msgpack. `kind`: RESULT or ERROR; meta/data as on the fabric."""

    call: CallId
    state: CallState
    kind: int = 0
    meta: bytes = b""
    data: bytes = b""
    detail: str = ""


class BillRow(Record, frozen=True):
    """GET /v1/usage: one row per lease class. All in core-seconds.

    amount_s   of further kinds, by name: how much was held x seconds
    price      of all that was held, in `currency`; 0 where the site has no prices
    """

    lease_class: LeaseClass
    leases: int
    allocated_core_s: float
    busy_core_s: float
    spin_core_s: float
    cpu_s: float
    calls: int
    amount_s: dict[str, float] = msgspec.field(default_factory=dict)
    price: float = 0.0
    currency: str = ""


class LicenseSummary(Record, frozen=True):
    """GET /v1/licenses. `held` by leases of this site, `others` by whoever else."""

    name: str
    total: int
    held: int
    others: int
    free: int


class NewKey(Record, frozen=True):
    """POST /v1/keys. Roles: admin (all), operator (sees all, drains nodes), user (own things)."""

    tenant: TenantId
    role: Literal["admin", "operator", "user"] = "user"
    label: str = ""


class KeySummary(Record, frozen=True):
    key: KeyId
    tenant: TenantId
    role: str
    label: str
    created_s: float
    revoked: bool = False
    secret: str = ""  # only in the reply that creates it


class SiteFile(Record, frozen=True):
    """`site.json` in the state directory of a running site: how local clients find it."""

    url: str
    pid: int
    version: str
    ephemeral: bool = False


class PoolReport(Record, frozen=True):
    """A pool of allocations that stand ready: what it has, and in `words`, line by line, why it has no more.

    running, waiting   allocations; `leases` on them; `cores_free` for further ones
    """

    pool: str
    contract: str
    minimum: int
    maximum: int
    running: int
    waiting: int
    leases: int
    cores: int
    cores_free: int
    words: tuple[str, ...] = ()


class SiteStatus(Record, frozen=True):
    """GET /v1/status"""

    url: str
    version: str
    platform: str
    pid: int
    uptime_s: float
    nodes: int
    cores: int
    cores_leased: int
    leases_active: int
    requests_waiting: int
    tenant: TenantId
    role: str
    pools: tuple[PoolReport, ...] = ()


class LogChunk(Record, frozen=True):
    """GET /v1/logs/{lease}?offset=N: bytes of the executors' stdout and stderr from `offset`, as text."""

    lease: LeaseId
    text: str
    next_offset: int
    ended: bool


class KillReply(Record, frozen=True):
    executor: ExecutorId
    killed: bool


def encode(value: msgspec.Struct) -> bytes:
    return msgspec.json.encode(value)
