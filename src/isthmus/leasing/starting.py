"""Start granted leases on their nodes: take the allocation, order the agent, wait for its answer.

Invariant: a lease whose start failed for certain ends at once; one whose start may have succeeded (no answer)
keeps its resources until the agent confirms its end, or until it is fenced. `together` starts all or none.
"""

import asyncio
import contextlib
from collections.abc import Mapping

import msgspec

from isthmus.core import tokens
from isthmus.core.clock import Clock
from isthmus.core.errors import IsthmusError, LeaseEndedError, SiteUnavailableError
from isthmus.core.kinds import HeldBy, is_site_wide
from isthmus.core.model import EndReason, LeaseState, Resources
from isthmus.leasing.acting import Acting
from isthmus.leasing.books import Held
from isthmus.leasing.control import NodeControl
from isthmus.leasing.ledger import LedgerError
from isthmus.leasing.lifecycle import EndOrdered, Event, Gone, Started
from isthmus.node.messages import Done, StartLease
from isthmus.platforms.platform import Platform


class Starting:
    def __init__(
        self, acting: Acting, platform: Platform, control: NodeControl, clock: Clock, site_key: bytes
    ) -> None:
        self._acting = acting
        self._platform = platform
        self._control = control
        self._clock = clock
        self._site_key = site_key

    async def start(self, leases: list[Held], together: bool) -> tuple[list[Held], IsthmusError | None]:
        """Start all at once; those that are active then, and the first failure.

        Cancelled on the way, it ends all of them. Raises LedgerError when the outcome cannot be written.
        """
        for held in leases:
            held.is_starting = True
        try:
            answers = await asyncio.gather(*(self._start(held) for held in leases))
            return self._settle(leases, answers, together)
        except asyncio.CancelledError:
            with contextlib.suppress(LedgerError):  # then the reconcile loop finds them without a requester
                self._acting.withdraw(leases, EndReason.CANCELLED, "its requester left")
            raise
        finally:
            for held in leases:
                held.is_starting = False

    async def _start(self, held: Held) -> Done | Event:
        """The agent's answer, or the event that its absence means."""
        lease = held.lease
        assert lease.node is not None
        holds: Mapping[str, HeldBy] = {}
        try:
            if lease.allocation is not None:
                await self._acting.all_freed()
                allocation = await self._platform.acquire(
                    lease.allocation, lease.node, lease.resources, lease.lease_class
                )
                self._acting.know_end(held, allocation)
                holds = allocation.holds
        except IsthmusError as error:
            return _Failure(at_s=self._clock.now(), error=error, may_run=False)
        if not _is_wanted(held):
            return _Failure(at_s=self._clock.now(), error=_ended(held), may_run=False)
        try:
            done = await self._control.order(lease.agent or lease.node, self._order(held))
            return _with_site_wide(done, lease.resources, holds)
        except SiteUnavailableError as error:
            return _Failure(at_s=self._clock.now(), error=error, may_run=True)
        except IsthmusError as error:
            return _Failure(at_s=self._clock.now(), error=error, may_run=False)

    def _order(self, held: Held) -> StartLease:
        lease = held.lease
        return StartLease(
            number=0,
            lease=lease.lease,
            tenant=lease.tenant,
            resources=lease.resources,
            lease_class=lease.lease_class,
            environment=lease.environment,
            lease_key=tokens.lease_key(self._site_key, lease.lease),
            now_s=self._clock.now(),
            deadline_s=lease.deadline_s,
        )

    def _settle(
        self, leases: list[Held], answers: list[Done | Event], together: bool
    ) -> tuple[list[Held], IsthmusError | None]:
        """Write all outcomes in one transaction."""
        failures = [_failure(held, answer) for held, answer in zip(leases, answers, strict=True)]
        first = next((failure for failure in failures if failure is not None), None)
        events: list[tuple[Held, Event]] = []
        started: list[Held] = []
        for held, answer, failure in zip(leases, answers, failures, strict=True):
            if not _is_wanted(held):
                continue  # it ended on the way, with its own reason
            if isinstance(answer, Done):
                events.append((held, self._started(answer)))
                if first is not None and together:
                    events.append((held, self._end(f"its group could not start together: {first}")))
                else:
                    started.append(held)
            elif isinstance(answer, _Failure):
                events.append((held, self._end(str(failure)) if answer.may_run else self._gone(str(failure))))
        self._acting.apply(events)
        now = self._clock.monotonic()
        for held in started:
            held.seen_at = now
        return started, first

    def _started(self, done: Done) -> Started:
        assert done.executor is not None
        assert done.enforcement is not None
        return Started(at_s=self._clock.now(), executor=done.executor, enforcement=done.enforcement)

    def _end(self, detail: str) -> EndOrdered:
        return EndOrdered(at_s=self._clock.now(), reason=EndReason.FAILED, detail=detail)

    def _gone(self, detail: str) -> Gone:
        return Gone(at_s=self._clock.now(), reason=EndReason.FAILED, detail=detail)


class _Failure(Event, frozen=True):
    """`may_run`: no answer came, so the lease may or may not run."""

    error: IsthmusError
    may_run: bool


def _with_site_wide(done: Done, resources: Resources, holds: Mapping[str, HeldBy]) -> Done:
    """The agent's answer, and how the platform keeps what is not on its node."""
    kept = {kind: holds.get(kind, "accounted-only") for kind in resources.amounts if is_site_wide(kind)}
    if done.enforcement is None or not kept:
        return done
    enforcement = msgspec.structs.replace(done.enforcement, amounts={**done.enforcement.amounts, **kept})
    return msgspec.structs.replace(done, enforcement=enforcement)


def _failure(held: Held, answer: Done | Event) -> IsthmusError | None:
    if isinstance(answer, _Failure):
        return answer.error
    return None if _is_wanted(held) else _ended(held)


def _is_wanted(held: Held) -> bool:
    return held.lease.state is LeaseState.STARTING


def _ended(held: Held) -> LeaseEndedError:
    lease = held.lease
    detail = f": {lease.end_detail}" if lease.end_detail else ""
    return LeaseEndedError(f"lease {lease.lease} ended while it started ({lease.end_reason}){detail}")
