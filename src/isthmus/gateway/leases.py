"""REST: leases, their executors, their logs, and the explanations of decisions."""

import asyncio
from collections import OrderedDict

from isthmus.core.api import (
    ExecutorReply,
    KillReply,
    LeaseReply,
    LeaseRequest,
    LogChunk,
    RenewReply,
    RenewRequest,
)
from isthmus.core.errors import (
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    SiteUnavailableError,
)
from isthmus.core.ids import ExecutorId, LeaseId
from isthmus.core.model import Lease, LeaseState, Record
from isthmus.gateway.operations import NESTED, Asked, Operation
from isthmus.leasing import Explanation, Leasing
from isthmus.leasing.control import NodeControl
from isthmus.node.messages import ReadLog

REPLIES_MAX = 10_000  # lease requests remembered by their Idempotency-Key, newest kept
OFFSET_MAX = 2**62
COUNT_MAX = 1024  # leases in one request


class ListQuery(Record, frozen=True):
    ended: bool = False


class LogQuery(Record, frozen=True):
    offset: int = 0


class Leases:
    def __init__(self, leasing: Leasing, control: NodeControl) -> None:
        self._leasing = leasing
        self._control = control
        self._replies: OrderedDict[tuple[str, str], asyncio.Future[LeaseReply]] = OrderedDict()

    def operations(self) -> list[Operation]:
        lease = "/v1/leases/{lease}"
        return [
            Operation(
                "POST",
                "/v1/leases",
                "Ask for leases; answers when they are active",
                self.request,
                LeaseReply,
                body=LeaseRequest,
                status=201,
                detached=False,
            ),
            Operation(
                "POST", "/v1/leases/renew", "Prolong leases", self.renew, RenewReply, body=RenewRequest
            ),
            Operation(
                "GET",
                "/v1/leases",
                "Your leases; with ended=1 also those of the past",
                self.show_all,
                list[Lease],
                query=ListQuery,
            ),
            Operation("GET", lease, "One lease", self.show, Lease, roles=NESTED),
            Operation("DELETE", lease, "End a lease", self.release, Lease),
            Operation(
                "POST",
                f"{lease}/executors",
                "One more executor inside a lease",
                self.add_executor,
                ExecutorReply,
                roles=NESTED,
                status=201,
            ),
            Operation(
                "DELETE",
                f"{lease}/executors/{{executor}}",
                "Kill an executor at once",
                self.kill_executor,
                KillReply,
                roles=NESTED,
            ),
            Operation(
                "GET",
                "/v1/logs/{lease}",
                "Output of a lease's functions from an offset",
                self.log,
                LogChunk,
                query=LogQuery,
            ),
            Operation(
                "GET",
                "/v1/explain/{id}",
                "Why a request or lease was decided as it was",
                self.explain,
                Explanation,
            ),
        ]

    async def request(self, asked: Asked) -> LeaseReply:
        if not 1 <= asked.body.count <= COUNT_MAX:
            raise InvalidRequestError(f"count={asked.body.count}; ask for 1 to {COUNT_MAX} leases at a time")
        if not asked.idempotency_key:
            return await self._leasing.request(asked.principal, asked.body)
        return await self._request_once((asked.principal.tenant, asked.idempotency_key), asked)

    async def _request_once(self, key: tuple[str, str], asked: Asked) -> LeaseReply:
        """The same key again gets the first reply, also while that is still being made. Failures are not
        kept.
        """
        reply = self._replies.get(key)
        if reply is None or (reply.done() and (reply.cancelled() or reply.exception() is not None)):
            reply = asyncio.ensure_future(self._leasing.request(asked.principal, asked.body))
            self._replies[key] = reply
            self._replies.move_to_end(key)
            if len(self._replies) > REPLIES_MAX:
                self._replies.popitem(last=False)
        return await reply

    async def renew(self, asked: Asked) -> RenewReply:
        return await self._leasing.renew(asked.principal, asked.body.leases)

    async def show_all(self, asked: Asked) -> list[Lease]:
        return self._leasing.leases(asked.principal, asked.query.ended)

    async def show(self, asked: Asked) -> Lease:
        return self._leasing.lease(asked.principal, _own_lease(asked))

    async def release(self, asked: Asked) -> Lease:
        lease_id = LeaseId(asked.path["lease"])
        await self._leasing.release(asked.principal, lease_id)
        return self._leasing.lease(asked.principal, lease_id)

    async def add_executor(self, asked: Asked) -> ExecutorReply:
        return await self._leasing.add_executor(asked.principal, _own_lease(asked))

    async def kill_executor(self, asked: Asked) -> KillReply:
        executor = ExecutorId(asked.path["executor"])
        return await self._leasing.kill_executor(asked.principal, _own_lease(asked), executor)

    async def explain(self, asked: Asked) -> Explanation:
        return self._leasing.explain(asked.principal, asked.path["id"])

    async def log(self, asked: Asked) -> LogChunk:
        lease = self._leasing.lease(asked.principal, LeaseId(asked.path["lease"]))
        ended = lease.state is LeaseState.ENDED
        offset = min(max(asked.query.offset, 0), OFFSET_MAX)
        if lease.orders_to is None:
            return LogChunk(lease=lease.lease, text="", next_offset=offset, ended=ended)
        try:
            done = await self._control.order(
                lease.orders_to, ReadLog(number=0, lease=lease.lease, offset=offset)
            )
        except NotFoundError:  # it wrote nothing, or the node keeps that no more: nothing more will come
            return LogChunk(lease=lease.lease, text="", next_offset=offset, ended=True)
        except SiteUnavailableError as error:
            if not ended:
                raise
            raise SiteUnavailableError(f"the output of {lease.lease} stayed on its node: {error}") from error
        return LogChunk(lease=lease.lease, text=done.text, next_offset=done.next_offset, ended=ended)


def _own_lease(asked: Asked) -> LeaseId:
    """The lease in the path. Code under a lease may touch that lease and no other."""
    lease_id, principal = LeaseId(asked.path["lease"]), asked.principal
    if principal.role == "lease" and principal.lease != lease_id:
        raise PermissionDeniedError(f"this token is for lease {principal.lease}, not for {lease_id}")
    return lease_id
