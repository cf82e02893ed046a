"""Act on transitions: write them down, then give the orders that follow, in the background, until they are
confirmed.

Invariant: nothing is ordered that the ledger does not hold. Orders are idempotent, at most one of a kind per
lease is on its way, and one that fails is repeated by the reconcile loop: the loop looks at states, not at
failures. Not here: the order that starts a lease, for which a requester waits (`starting.py`).
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterable, Sequence

import structlog

from isthmus.core.clock import Clock
from isthmus.core.errors import IsthmusError, NotFoundError, SiteUnavailableError
from isthmus.core.ids import AllocationId, LeaseId, NodeId
from isthmus.core.model import EndReason, LeaseState, Resources
from isthmus.core.settings import LeasingSettings
from isthmus.leasing.books import Books, Change, Held
from isthmus.leasing.control import NodeControl
from isthmus.leasing.lifecycle import (
    OPEN,
    DrainOnNode,
    EndOnNode,
    EndOrdered,
    Event,
    FreeResources,
    Gone,
    Renewed,
    RenewOnNode,
    StartOnNode,
)
from isthmus.node.messages import DrainLease, EndLease, Order, RenewLease
from isthmus.platforms.platform import Allocation, Platform
from isthmus.policy.replay import Logged

# Whoever gets these has had its grace, or nobody is left who could use one.
_AT_ONCE = frozenset({EndReason.EVICTED, EndReason.FAILED, EndReason.CANCELLED, EndReason.NODE_LOST})

_log = structlog.get_logger("leasing")


class Acting:
    """`on_freed` is called when resources have become free, and may grant them at once."""

    def __init__(
        self, settings: LeasingSettings, books: Books, platform: Platform, control: NodeControl, clock: Clock
    ) -> None:
        self._settings = settings
        self._books = books
        self._platform = platform
        self._control = control
        self._clock = clock
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.on_freed: Callable[[], None] = _nothing

    def apply(
        self,
        events: Iterable[tuple[Held, Event]],
        new: Sequence[Held] = (),
        decisions: tuple[Logged, ...] = (),
    ) -> list[Change]:
        """Write the steps, then carry out what follows. Raises LedgerError: then nothing happened."""
        changes = self._books.apply(events, new, decisions)
        for change in changes:
            for effect in change.effects:
                self._carry_out(change.held, effect)
        if any(isinstance(change.event, Gone) for change in changes):
            self.on_freed()
        return changes

    def end(self, held: Held, reason: EndReason, detail: str = "") -> None:
        """Have the lease ended; the first reason stands. Raises LedgerError."""
        self.apply([(held, EndOrdered(at_s=self._clock.now(), reason=reason, detail=detail))])

    def withdraw(self, leases: Iterable[Held], reason: EndReason, detail: str) -> None:
        """Have all of them ended that are not over yet, in one transaction. Raises LedgerError."""
        now_s = self._clock.now()
        running = [held for held in leases if held.lease.state in OPEN]
        self.apply([(held, EndOrdered(at_s=now_s, reason=reason, detail=detail)) for held in running])

    def agent_of(self, allocation: AllocationId, node: NodeId) -> NodeId | None:
        return self._platform.agent_of(allocation, node)

    def want(self, waiting: tuple[Resources, ...]) -> None:
        self._platform.want(waiting)

    def know_end(self, held: Held, allocation: Allocation) -> None:
        """When the allocation's time is nearly over: early enough to hand running calls over."""
        held.closes_at = self._clock.monotonic() + allocation.closes_s - self._clock.now()

    def bury(self, held: Held, gone: Gone) -> None:
        """Its agent says that the platform took the allocation back: ask why, then write it down."""
        self._spawn(("fate", held.lease.lease), self._bury(held, gone))

    def extend_fence(self, held: Held) -> None:
        """Called before an order with a deadline leaves: until then, and the orphans' time, it may run."""
        allowance_s = self._settings.lease_s + self._settings.orphan_s + self._settings.agent_silence_s
        held.fenced_at = self._clock.monotonic() + allowance_s

    def repeat_end(self, held: Held) -> None:
        self._carry_out(held, EndOnNode())

    def renew(self, held: Held) -> None:
        """Tell its agent the lease's deadline."""
        self._carry_out(held, RenewOnNode())

    def prolong(self, held: Held) -> None:
        """A full life from now, and its agent is told."""
        now_s = self._clock.now()
        now = self._clock.monotonic()
        life_s = min(self._settings.lease_s, max(held.closes_at - now, 0.0))
        held.expires_at = now + self._settings.lease_s
        self._books.note(held, Renewed(at_s=now_s, deadline_s=now_s + life_s))
        self.renew(held)

    def order(self, kind: str, node: NodeId, order: Order, about: str) -> None:
        """Give an order whose answer matters to nobody."""
        self._spawn((kind, f"{node} {about}"), self._order(node, order))

    def release(self, allocation: AllocationId) -> None:
        self._spawn(("free", allocation), self._platform.release(allocation))

    async def ended(self, lease: LeaseId) -> None:
        """Until the order to end this lease, if one is on its way, has been answered."""
        await self._wait(
            [task for (kind, name), task in self._tasks.items() if (kind, name) == ("end", lease)]
        )

    async def all_ended(self) -> None:
        await self._wait([task for (kind, _), task in self._tasks.items() if kind in ("end", "free")])

    async def all_freed(self) -> None:
        """Until what was given back has reached the platform, so that it can be had again."""
        await self._wait([task for (kind, _), task in self._tasks.items() if kind == "free"])

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # inside -------------------------------------------------------------------------------------------------
    def _carry_out(self, held: Held, effect: object) -> None:
        lease = held.lease
        match effect:
            case StartOnNode():
                self.extend_fence(held)
            case RenewOnNode():
                self._spawn(("renew", lease.lease), self._renew(held))
            case DrainOnNode():
                held.evicted_at = self._clock.monotonic() + self._settings.grace_s
                self._spawn(("drain", lease.lease), self._drain(held))
            case EndOnNode():
                self._spawn(("end", lease.lease), self._end(held))
            case FreeResources():
                assert lease.allocation is not None
                self.release(lease.allocation)

    def _spawn(self, key: tuple[str, str], act: Coroutine[object, object, None]) -> None:
        if key in self._tasks:
            act.close()  # the same order is on its way
            return
        task = asyncio.get_running_loop().create_task(
            self._guarded(key, act), name=f"leasing.{key[0]} {key[1]}"
        )
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def _guarded(self, key: tuple[str, str], act: Coroutine[object, object, None]) -> None:
        try:
            await act
        except IsthmusError as error:
            _log.warning(
                "order failed; the reconcile loop repeats it", order=key[0], about=key[1], why=str(error)
            )

    async def _order(self, node: NodeId, order: Order) -> None:
        await self._control.order(node, order)

    async def _renew(self, held: Held) -> None:
        """Tell the agent the latest deadline; renewals that came meanwhile are told in one."""
        told_s = 0.0
        while held.lease.deadline_s != told_s and not held.is_over and held.lease.orders_to:
            told_s = held.lease.deadline_s
            self.extend_fence(held)
            order = RenewLease(number=0, lease=held.lease.lease, now_s=self._clock.now(), deadline_s=told_s)
            try:
                await self._control.order(held.lease.orders_to, order)
            except NotFoundError:
                if held.lease.state is LeaseState.ACTIVE:
                    self.end(held, EndReason.NODE_LOST, "its agent does not know it any more")

    async def _drain(self, held: Held) -> None:
        assert held.lease.orders_to is not None
        order = DrainLease(number=0, lease=held.lease.lease, grace_s=self._settings.grace_s)
        await self._control.order(held.lease.orders_to, order)

    async def _end(self, held: Held) -> None:
        lease = held.lease
        assert lease.orders_to is not None
        assert lease.end_reason is not None
        grace_s = 0.0 if lease.end_reason in _AT_ONCE else self._settings.grace_s
        order = EndLease(number=0, lease=lease.lease, reason=lease.end_reason, grace_s=grace_s)
        try:
            await self._control.order(lease.orders_to, order)
        except SiteUnavailableError:
            if lease.agent is None or lease.allocation is None:
                raise
            await self._platform.release(lease.allocation)  # the platform ends all that runs in it
        if not held.is_over:
            self.apply([(held, Gone(at_s=self._clock.now(), reason=lease.end_reason))])

    async def _bury(self, held: Held, gone: Gone) -> None:
        assert held.lease.allocation is not None
        assert held.lease.node is not None
        with contextlib.suppress(SiteUnavailableError):
            fate = await self._platform.fate(held.lease.allocation, held.lease.node)
            if fate is not None and fate.state == "ended":
                gone = Gone(at_s=gone.at_s, reason=fate.end_reason, detail=fate.detail)
        if not held.is_over:
            self.apply([(held, gone)])

    async def _wait(self, tasks: list[asyncio.Task[None]]) -> None:
        if tasks:
            await asyncio.wait(tasks)


def _nothing() -> None:
    """Nobody waits for resources."""
