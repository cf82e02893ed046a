"""Where executors come from: leases of a site, or, for code that runs under a lease, more executors of that
lease.

Two sources with the same six verbs. Both block on the network and are used only by the control thread and by
request threads (`keeping.py`).
"""

from typing import NamedTuple, Protocol

from isthmus.core import api
from isthmus.core.errors import (
    CallError,
    EvictedError,
    ExecutorLostError,
    IsthmusError,
    MemoryLimitError,
    NotFoundError,
    SiteUnavailableError,
)
from isthmus.core.ids import ExecutorId, LeaseId
from isthmus.core.model import EndReason, Lease
from isthmus.sdk.control import Control

_TAKEN_BACK = (
    EndReason.EVICTED,
    EndReason.IDLE,
    EndReason.EXPIRED,
    EndReason.SITE_STOPPED,
    EndReason.RELEASED,
)


class Holding(NamedTuple):
    """One executor that we may call. `lease_s` 0: somebody else renews its lease. `open_s`: for so long from
    its grant it takes calls; 0: nobody knows of an end.
    """

    lease: LeaseId
    executor: ExecutorId
    address: str
    token: str
    lease_s: float
    open_s: float = 0.0


class Supply(Protocol):
    def take(self, request: api.LeaseRequest) -> list[Holding]:
        """At least one, or an IsthmusError that says why not."""
        ...

    def give_back(self, holding: Holding) -> None: ...

    def renew(self, leases: tuple[LeaseId, ...]) -> tuple[api.Renewal, ...]: ...

    def kill(self, holding: Holding) -> None: ...

    def cause_of_death(self, holding: Holding) -> CallError | EvictedError | None:
        """Why this executor died; None when the site does not know yet."""
        ...

    def hang_up(self) -> None:
        """Ask for nothing any more: requests under way fail, and the site takes back what they would get."""
        ...


class LeaseSupply:
    """Leases of a site."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def take(self, request: api.LeaseRequest) -> list[Holding]:
        grants = self._control.request_leases(request).grants
        return [
            Holding(
                grant.lease,
                grant.executors[0].executor,
                grant.executors[0].address,
                grant.token,
                grant.lease_s,
                grant.open_s,
            )
            for grant in grants
        ]

    def give_back(self, holding: Holding) -> None:
        self._control.release(holding.lease)

    def renew(self, leases: tuple[LeaseId, ...]) -> tuple[api.Renewal, ...]:
        return self._control.renew(leases).renewals

    def kill(self, holding: Holding) -> None:
        self._control.kill_executor(holding.lease, holding.executor)

    def cause_of_death(self, holding: Holding) -> CallError | EvictedError | None:
        return _cause(self._control, holding)

    def hang_up(self) -> None:
        self._control.hang_up()


class NestedSupply:
    """More executors inside the lease that this code runs under. Needs no capacity, so nesting cannot
    deadlock.
    """

    def __init__(self, control: Control, lease: LeaseId) -> None:
        self._control = control
        self._lease = lease

    def take(self, request: api.LeaseRequest) -> list[Holding]:
        taken: list[Holding] = []
        for _ in range(request.count):
            try:
                reply = self._control.add_executor(self._lease)
            except IsthmusError:
                if not taken or request.together:
                    for holding in taken:
                        self.give_back(holding)
                    raise
                break
            taken.append(
                Holding(self._lease, reply.executor.executor, reply.executor.address, reply.token, 0.0)
            )
        return taken

    def give_back(self, holding: Holding) -> None:
        self._control.kill_executor(holding.lease, holding.executor)

    def renew(self, leases: tuple[LeaseId, ...]) -> tuple[api.Renewal, ...]:
        return ()

    def kill(self, holding: Holding) -> None:
        self._control.kill_executor(holding.lease, holding.executor)

    def cause_of_death(self, holding: Holding) -> CallError | EvictedError | None:
        return _cause(self._control, holding)

    def hang_up(self) -> None:
        self._control.hang_up()


def _cause(control: Control, holding: Holding) -> CallError | EvictedError | None:
    advice = "it may have run in part, so retry only if it is idempotent"
    try:
        lease = control.lease(holding.lease)
    except NotFoundError:
        return ExecutorLostError(f"executor {holding.executor} died and its lease is forgotten; {advice}")
    except SiteUnavailableError:
        return ExecutorLostError(f"executor {holding.executor} died and the site cannot say why; {advice}")
    known = [end for end in lease.lost_executors if end.executor == holding.executor]
    if known:
        return cause_of(lease, holding.executor, known[0].reason, known[0].detail, advice)
    if lease.end_reason is None:
        others = [info for info in lease.executors if info.executor != holding.executor]
        if others and len(others) == len(lease.executors):  # the lease goes on without it
            return ExecutorLostError(f"executor {holding.executor} died; {advice}")
        return None
    return cause_of(lease, holding.executor, lease.end_reason, lease.end_detail, advice)


def cause_of(
    lease: Lease, executor: ExecutorId, reason: EndReason, detail: str, advice: str
) -> CallError | EvictedError:
    """`reason` and `detail`: of this executor's end, or of the whole lease's."""
    detail = detail or str(reason)
    if reason is EndReason.OUT_OF_MEMORY:
        limit = lease.resources.memory
        return MemoryLimitError(
            f"executor {executor} was killed ({detail}); ask for more than {limit} with Resources(memory=...)"
        )
    if reason in _TAKEN_BACK:
        return EvictedError(f"lease {lease.lease} was taken back ({reason}: {detail})")
    return ExecutorLostError(f"executor {executor} died while it ran the call ({detail}); {advice}")
