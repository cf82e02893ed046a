"""Grant leases: decide, write down, and let those wait whom a later moment may serve.

    demand -> decide -> leases written as `starting`, or a place in the queue, or a typed refusal
Invariant: whoever waits is served, refused or gone within its wait_s; what is granted to a requester that has
left is taken back at once. Not here: starting what was granted (`starting.py`).
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable

from isthmus.core.clock import Clock
from isthmus.core.errors import DeniedError, IsthmusError, NoCapacityError, SiteUnavailableError
from isthmus.core.ids import AllocationId, LeaseId, NodeId, TenantId
from isthmus.core.model import EndReason, Lease, LeaseClass, LeaseState, Resources
from isthmus.core.settings import LeasingSettings
from isthmus.leasing.acting import Acting
from isthmus.leasing.books import Books, Held
from isthmus.leasing.ledger import LedgerError
from isthmus.leasing.lifecycle import DrainOrdered, Event, Granted, StartOrdered
from isthmus.leasing.waiting import Waiter, WaitingQueue
from isthmus.policy import Decision, Demand, Logged, PolicySet, Snapshot, decide, fairness, priority

WANTED_MAX = 256  # leases that the platform is told of; more follow when it has got these
WAITING_SHOWN_MAX = 32  # tenants in the queue that a decision is told of, to say who comes before whom


class Granting:
    def __init__(
        self,
        settings: LeasingSettings,
        books: Books,
        acting: Acting,
        policies: PolicySet,
        clock: Clock,
        new_id: Callable[[str], str],
    ) -> None:
        self._settings = settings
        self._books = books
        self._acting = acting
        self._policies = policies
        self._clock = clock
        self._new_id = new_id
        self._queue = WaitingQueue(settings.queue_max)
        self._told: tuple[Resources, ...] = ()
        self.is_closing = False

    @property
    def requests_waiting(self) -> int:
        return len(self._queue)

    def close(self) -> None:
        """Turn everybody away."""
        self.is_closing = True
        for waiter in self._queue.all():
            self._queue.remove(waiter)
            if not waiter.answer.done():
                waiter.answer.set_exception(SiteUnavailableError("the site is stopping"))

    async def grant(self, demand: Demand) -> tuple[Decision, list[Held]]:
        """Granted and written down, at once or after waiting. A tenant overtakes itself only by
        priority.
        """
        decision = None
        own = self._queue.first(demand.tenant)
        urgency = 0 if own is None else self._priority(demand)
        if own is None or urgency > own.priority:
            decision, granted = self._try(demand, is_first=True)
            if granted:
                return decision, granted
            urgency = decision.priority
        if demand.lease.wait_s == 0:
            raise _refusal(demand, decision)
        waiter = Waiter(demand, urgency, decision)
        self._queue.add(waiter)
        self._tell_what_waits()
        try:
            async with asyncio.timeout(min(demand.lease.wait_s, self._settings.queue_wait_s)):
                return await waiter.answer
        except TimeoutError:
            if waiter.answer.done() and not waiter.answer.cancelled():
                return waiter.answer.result()
            raise _refusal(demand, waiter.decision) from None
        except asyncio.CancelledError:
            if waiter.is_granted:
                with contextlib.suppress(
                    LedgerError
                ):  # then the reconcile loop finds them without a requester
                    self._acting.withdraw(
                        waiter.answer.result()[1], EndReason.CANCELLED, "its requester left"
                    )
            raise
        finally:
            self._queue.remove(waiter)
            self._tell_what_waits()

    def _tell_what_waits(self) -> None:
        """The platform may fetch more; not for those whom their quota holds back."""
        some = (waiter.missing for waiter in self._queue.all())
        wanted = tuple(itertools.islice(itertools.chain.from_iterable(some), WANTED_MAX))
        if wanted != self._told:
            self._told = wanted
            self._acting.want(wanted)

    def _priority(self, demand: Demand) -> int:
        return priority(self._policies, self._books.situation(), demand)

    def _try(self, demand: Demand, is_first: bool) -> tuple[Decision, list[Held]]:
        """Decide once, and write down what follows. Raises DeniedError, LedgerError."""
        waiting = self._queue.tenants(WAITING_SHOWN_MAX)
        snapshot = self._books.snapshot(self._policies, demand, waiting)
        decision = decide(self._policies, snapshot, demand)
        match decision.outcome:
            case "grant":
                return decision, self._enter(demand, decision, snapshot)
            case "deny":
                self._acting.apply([], decisions=(_logged(demand, snapshot, decision),))
                raise _refusal(demand, decision)
            case "wait":
                self._make_room(demand, decision, snapshot, is_first)
                return decision, []

    def _make_room(self, demand: Demand, decision: Decision, snapshot: Snapshot, is_first: bool) -> None:
        """Ask those to leave whom the decision names. Trying again in vain is not worth a line in the log."""
        pushed = [self._books.open[lease] for lease in decision.evict]
        drains: list[tuple[Held, Event]] = [(held, DrainOrdered(at_s=snapshot.clock_s)) for held in pushed]
        if is_first or drains:
            self._acting.apply(drains, decisions=(_logged(demand, snapshot, decision),))

    def _enter(self, demand: Demand, decision: Decision, snapshot: Snapshot) -> list[Held]:
        """The decision and all its leases in one transaction, ready to be started."""
        now_s = self._clock.now()
        new = [self._new_lease(demand, decision.lease_class, now_s) for _ in decision.places]
        events: list[tuple[Held, Event]] = []
        for held, node in zip(new, decision.places, strict=True):
            allocation, agent = self._allocation(decision.lease_class, node)
            events.append((held, Granted(at_s=now_s, node=node, allocation=allocation, agent=agent)))
            events.append((held, StartOrdered(at_s=now_s, deadline_s=now_s + self._settings.lease_s)))
            held.expires_at = self._clock.monotonic() + self._settings.lease_s
            held.seen_at = self._clock.monotonic()
            held.is_starting = True
        self._acting.apply(events, new=new, decisions=(_logged(demand, snapshot, decision),))
        return new

    def _allocation(self, lease_class: LeaseClass, node: NodeId) -> tuple[AllocationId | None, NodeId | None]:
        """Its name, and the agent that comes with it. A harvested lease has none of its own."""
        if lease_class is LeaseClass.HARVESTED:
            return None, None
        allocation = AllocationId(self._new_id("al"))
        return allocation, self._acting.agent_of(allocation, node)

    def _new_lease(self, demand: Demand, lease_class: LeaseClass, now_s: float) -> Held:
        asked = demand.lease
        lease = Lease(
            lease=LeaseId(self._new_id("ls")),
            tenant=demand.tenant,
            resources=asked.resources,
            lease_class=lease_class,
            environment=asked.environment,
            state=LeaseState.REQUESTED,
            pool=asked.pool,
            created_s=now_s,
            parent=asked.parent,
            labels=asked.labels,
        )
        return Held(lease, demand.request)

    def serve_waiters(self) -> None:
        """Something became free: serve those who wait, whoever stands lowest first, until nobody more can be
        served. Each grant changes where its tenant stands.
        """
        tried: set[Waiter] = set()
        untried = [] if self.is_closing else self._queue.heads(self._level)
        while untried:
            waiter = untried.pop(0)
            tried.add(waiter)
            if self._serve(waiter):
                untried = [one for one in self._queue.heads(self._level) if one not in tried]
        self._tell_what_waits()  # what holds them back may have changed

    def _level(self, tenant: TenantId) -> float:
        return fairness.standing(self._policies, self._books.situation(), tenant).level

    def _serve(self, waiter: Waiter) -> bool:
        """Whether the waiter got its answer. A ledger that cannot be written now leaves it waiting."""
        if waiter.answer.done():
            return False
        try:
            decision, granted = self._try(waiter.demand, is_first=waiter.decision is None)
        except LedgerError:
            return False
        except DeniedError as error:
            self._queue.remove(waiter)
            waiter.answer.set_exception(error)
            return True
        waiter.decision = decision
        waiter.has_cleared |= bool(decision.evict)
        if not granted:
            return False
        self._queue.remove(waiter)
        self._queue.rotate(waiter.demand.tenant)
        waiter.answer.set_result((decision, granted))
        return True


def _logged(demand: Demand, snapshot: Snapshot, decision: Decision) -> Logged:
    return Logged(demand=demand, snapshot=snapshot.record(), decision=decision)


def _refusal(demand: Demand, decision: Decision | None) -> IsthmusError:
    """What a request that got nothing raises: no is not the same as not now."""
    hint = f" (isthmus explain {demand.request})"
    if decision is None:
        return NoCapacityError(
            f"others of tenant {demand.tenant} wait before it, longer than its wait_s={demand.lease.wait_s:g}"
        )
    if decision.outcome == "deny" or decision.blocked_by == "quota":
        return DeniedError(decision.reason + hint)
    return NoCapacityError(decision.reason + hint)
