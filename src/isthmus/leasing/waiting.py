"""Requests that wait for capacity: bounded, first come first served within a tenant, turn by turn among
tenants.

Invariant: at most `limit` wait; a waiter is in the queue exactly as long as its answer is not set. Reserved
requests come before others, so that what was cleared for them is not given away.
Not here: who is served (`leasing.py` asks policy).
"""

import asyncio
from collections import deque

from isthmus.core.errors import NoCapacityError
from isthmus.core.ids import TenantId
from isthmus.core.model import LeaseClass
from isthmus.leasing.books import Held
from isthmus.policy.decide import Decision
from isthmus.policy.snapshot import Demand


class Waiter:
    """One waiting request. `answer` gets the granted leases, or the error that settles it."""

    def __init__(self, demand: Demand, decision: Decision | None = None) -> None:
        self.demand = demand
        self.decision = decision
        loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[tuple[Decision, list[Held]]] = loop.create_future()

    @property
    def is_granted(self) -> bool:
        return self.answer.done() and not self.answer.cancelled() and self.answer.exception() is None


class WaitingQueue:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_tenant: dict[TenantId, deque[Waiter]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def has(self, tenant: TenantId) -> bool:
        return tenant in self._by_tenant

    def add(self, waiter: Waiter) -> None:
        """Raises NoCapacityError when the queue is full: back-pressure is an answer."""
        if self._count >= self._limit:
            raise NoCapacityError(
                f"{self._count} requests wait already, as many as leasing.queue_max allows; try again later"
            )
        self._by_tenant.setdefault(waiter.demand.tenant, deque()).append(waiter)
        self._count += 1

    def remove(self, waiter: Waiter) -> None:
        """It was served, gave up, or is denied. Twice is fine."""
        waiters = self._by_tenant.get(waiter.demand.tenant)
        if waiters is None or waiter not in waiters:
            return
        waiters.remove(waiter)
        self._count -= 1
        if not waiters:
            del self._by_tenant[waiter.demand.tenant]

    def heads(self) -> list[Waiter]:
        """The first of each tenant, in the order in which they are to be tried."""
        heads = [waiters[0] for waiters in self._by_tenant.values()]
        return sorted(heads, key=lambda waiter: waiter.demand.lease.lease_class is not LeaseClass.RESERVED)

    def rotate(self, tenant: TenantId) -> None:
        """This tenant was served: the others come first now."""
        waiters = self._by_tenant.pop(tenant, None)
        if waiters is not None:
            self._by_tenant[tenant] = waiters

    def all(self) -> list[Waiter]:
        return [waiter for waiters in self._by_tenant.values() for waiter in waiters]
