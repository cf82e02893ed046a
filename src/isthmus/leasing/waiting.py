"""Requests that wait for capacity: bounded; by priority and first come first served within a tenant, by
priority, fair share and turn among tenants.

Invariant: at most `limit` wait; a waiter is in the queue exactly as long as its answer is not set. Reserved
requests, and those for whom others were asked to leave, come before all others, so that what was cleared for
them is not given away.
Not here: who is served, and where tenants stand (`granting.py` asks policy).
"""

import asyncio
import bisect
import itertools
from collections.abc import Callable, Iterator

from isthmus.core.errors import NoCapacityError
from isthmus.core.ids import TenantId
from isthmus.core.model import LeaseClass, Resources
from isthmus.leasing.books import Held
from isthmus.policy.decide import Decision
from isthmus.policy.snapshot import Demand


class Waiter:
    """One waiting request. `answer` gets the granted leases, or the error that settles it.

    has_cleared   others were asked to leave for it
    """

    def __init__(self, demand: Demand, priority: int, decision: Decision | None = None) -> None:
        self.demand = demand
        self.priority = priority
        self.decision = decision
        self.has_cleared = decision is not None and bool(decision.evict)
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[tuple[Decision, list[Held]]] = loop.create_future()

    @property
    def is_granted(self) -> bool:
        return self.answer.done() and not self.answer.cancelled() and self.answer.exception() is None

    @property
    def missing(self) -> Iterator[Resources]:
        """Of elastic leases for which there is no room."""
        asked, decision = self.demand.lease, self.decision
        lease_class = decision.lease_class if decision is not None else asked.lease_class
        if lease_class is LeaseClass.ELASTIC and (decision is None or decision.blocked_by != "quota"):
            yield from itertools.repeat(asked.resources, asked.count)


class WaitingQueue:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_tenant: dict[TenantId, list[Waiter]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def first(self, tenant: TenantId) -> Waiter | None:
        """The request of this tenant that is to be served next, if one waits."""
        waiters = self._by_tenant.get(tenant)
        return waiters[0] if waiters else None

    def tenants(self, limit: int) -> tuple[TenantId, ...]:
        """Some of those that wait, at most `limit`."""
        return tuple(itertools.islice(self._by_tenant, limit))

    def add(self, waiter: Waiter) -> None:
        """Raises NoCapacityError when the queue is full: back-pressure is an answer.

        A tenant that fills it keeps nobody else out: the last of its requests makes room for theirs.
        """
        if self._count >= self._limit:
            self._make_room(waiter.demand.tenant)
        waiters = self._by_tenant.setdefault(waiter.demand.tenant, [])
        bisect.insort(waiters, waiter, key=lambda one: -one.priority)
        self._count += 1

    def _make_room(self, tenant: TenantId) -> None:
        """Turn away whom the tenant with most requests would have served last, or raise."""
        full = NoCapacityError(
            f"{self._count} requests wait already, as many as leasing.queue_max allows; try again later"
        )
        largest = max(self._by_tenant.values(), key=len, default=[])
        if len(largest) <= len(self._by_tenant.get(tenant, ())) + 1:
            raise full
        last = largest[-1]
        self.remove(last)
        if not last.answer.done():  # else it has just given up by itself
            last.answer.set_exception(full)

    def remove(self, waiter: Waiter) -> None:
        """It was served, gave up, or is denied. Twice is fine."""
        waiters = self._by_tenant.get(waiter.demand.tenant)
        if waiters is None or waiter not in waiters:
            return
        waiters.remove(waiter)
        self._count -= 1
        if not waiters:
            del self._by_tenant[waiter.demand.tenant]

    def heads(self, level: Callable[[TenantId], float]) -> list[Waiter]:
        """The first of each tenant, in the order in which they are to be served.

        level   where a tenant stands by fair share: the lowest is served first
        """
        heads = [waiters[0] for waiters in self._by_tenant.values()]
        return sorted(heads, key=lambda waiter: _order(waiter, level))

    def rotate(self, tenant: TenantId) -> None:
        """This tenant was served: others that stand alike come first now."""
        waiters = self._by_tenant.pop(tenant, None)
        if waiters is not None:
            self._by_tenant[tenant] = waiters

    def all(self) -> list[Waiter]:
        return [waiter for waiters in self._by_tenant.values() for waiter in waiters]


def _order(waiter: Waiter, level: Callable[[TenantId], float]) -> tuple[bool, int, float]:
    is_awaited = waiter.has_cleared or waiter.demand.lease.lease_class is LeaseClass.RESERVED
    return not is_awaited, -waiter.priority, level(waiter.demand.tenant)
