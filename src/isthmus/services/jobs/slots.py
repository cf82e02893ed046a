"""Leases for durable calls, one call at a time each, reused for a short while so that 1,000 calls take a few
leases.

A call that finds no idle slot of its shape asks for one more lease; when there is no capacity it waits for a
slot to come back, and gives up idle slots of other shapes meanwhile. Held leases are renewed here until they
are released.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import structlog

from isthmus.core.api import DurableCall, Grant, KillReply, LeaseReply, LeaseRequest, RenewReply
from isthmus.core.clock import Clock
from isthmus.core.errors import DeniedError, IsthmusError, NoCapacityError, SiteUnavailableError
from isthmus.core.ids import ExecutorId, LeaseId, TenantId
from isthmus.core.model import Environment, Lease, LeaseClass, Principal, Resources
from isthmus.services.jobs.relay import Relay

IDLE_S = 2.0  # a slot without work keeps its lease this long
TICK_S = 1.0  # period of renewing and releasing, only while slots exist
RETRY_S = 0.5  # between two requests for capacity that was not there

LABELS = {"isthmus": "durable calls"}  # on leases made here, to know them again after a restart
_SITE = Principal(tenant=TenantId("site"), role="admin", name="durable calls")

_log = structlog.get_logger("services.jobs.slots")


class LeaseSource(Protocol):
    """The part of `Leasing` that durable calls need."""

    async def request(self, principal: Principal, request: LeaseRequest) -> LeaseReply: ...
    async def renew(self, principal: Principal, ids: tuple[LeaseId, ...]) -> RenewReply: ...
    async def release(self, principal: Principal, lease: LeaseId) -> object: ...
    async def kill_executor(
        self, principal: Principal, lease: LeaseId, executor: ExecutorId
    ) -> KillReply: ...
    def lease(self, principal: Principal, lease_id: LeaseId) -> Lease: ...
    def leases(self, principal: Principal, ended: bool) -> list[Lease]: ...


class Shape(NamedTuple):
    """What calls must have in common to run under the same lease."""

    tenant: str
    resources: Resources
    lease_class: LeaseClass
    environment: Environment
    policy: str


def shape_of(principal: Principal, call: DurableCall) -> Shape:
    return Shape(principal.tenant, call.resources, call.lease_class, call.environment, call.policy)


class Slot:
    def __init__(self, shape: Shape, principal: Principal, grant: Grant, channel_id: int) -> None:
        self.shape = shape
        self.principal = principal
        self.grant = grant
        self.channel_id = channel_id
        self.renewed_s = 0.0
        self.idle_since_s = 0.0
        self.functions: dict[str, int] = {}  # digest -> index in the channel's function table
        self.calls = 0

    @property
    def lease(self) -> LeaseId:
        return self.grant.lease


class Slots:
    def __init__(self, source: LeaseSource, relay: Relay, clock: Clock) -> None:
        self._source = source
        self._relay = relay
        self._clock = clock
        self._idle: dict[Shape, list[Slot]] = {}
        self._held: dict[int, Slot] = {}  # by channel
        self._growing: set[Shape] = set()
        self._changed = asyncio.Condition()
        self._some = asyncio.Event()
        relay.on_lost = self._lost

    async def take(self, principal: Principal, call: DurableCall) -> Slot:
        """An idle slot of the call's shape, or a new one. Raises DeniedError and refusals that stand."""
        shape = shape_of(principal, call)
        while True:
            if idle := self._idle.get(shape):
                return idle.pop()
            if shape not in self._growing:
                with self._grow(shape):
                    slot = await self._request(shape, principal, call)
                if slot is not None:
                    return slot
                await self._give_up_one(shape)
            await self._wait()

    async def end_orphans(self) -> None:
        """Give back leases of a site that died: their channels died with it, and they hold capacity."""
        orphans = [lease for lease in self._source.leases(_SITE, False) if lease.labels == LABELS]
        held = {slot.lease for slot in self._held.values()}
        for lease in orphans:
            if lease.lease not in held:
                with contextlib.suppress(IsthmusError):  # then it ends by itself: nobody renews it
                    await self._source.release(_SITE, lease.lease)

    async def give(self, slot: Slot) -> None:
        """Back, for the next call."""
        if slot.channel_id not in self._held:
            return
        slot.idle_since_s = self._clock.monotonic()
        self._idle.setdefault(slot.shape, []).append(slot)
        await self._notify()

    async def discard(self, slot: Slot) -> None:
        """End the slot's lease: its executor is gone, or what it runs is not to be trusted any more."""
        self._remove(slot)
        self._relay.disconnect(slot.channel_id)
        with contextlib.suppress(IsthmusError):  # the lease ends by itself when nobody renews it
            await self._source.release(slot.principal, slot.lease)
        await self._notify()

    def _lost(self, channel_id: int) -> None:
        """The executor behind this channel is gone. A call that runs there hears of it from the relay."""
        slot = self._held.get(channel_id)
        if slot is not None and slot in self._idle.get(slot.shape, ()):
            self._remove(slot)

    async def run(self) -> None:
        """Renew what is held and release what is idle, until cancelled."""
        while True:
            await self._some.wait()
            await self._clock.sleep(TICK_S)
            await self._renew()
            for slot in self._idle_too_long():
                await self.discard(slot)

    async def close(self) -> None:
        for slot in list(self._held.values()):
            await self.discard(slot)

    async def _request(self, shape: Shape, principal: Principal, call: DurableCall) -> Slot | None:
        """None: no capacity now."""
        request = LeaseRequest(
            resources=call.resources, lease_class=call.lease_class, environment=call.environment,
            policy=call.policy, function=call.function_name, labels=LABELS,
        )  # fmt: skip
        try:
            reply = await self._source.request(principal, request)
        except (NoCapacityError, SiteUnavailableError):
            return None
        except DeniedError:
            if self._holds_some(shape.tenant):  # a quota that is used up by our own slots: one comes back
                return None
            raise
        if not reply.grants:
            return None
        return await self._connect(shape, principal, reply.grants[0])

    def _holds_some(self, tenant: str) -> bool:
        return any(slot.shape.tenant == tenant for slot in self._held.values())

    async def _connect(self, shape: Shape, principal: Principal, grant: Grant) -> Slot | None:
        try:
            channel_id = await self._relay.connect(grant.executors[0].address, grant.token)
        except IsthmusError as error:
            _log.warning("cannot connect", lease=grant.lease, why=str(error))
            await self._source.release(principal, grant.lease)
            return None
        except asyncio.CancelledError:  # the call was cancelled meanwhile: nobody would know of this lease
            await self._source.release(principal, grant.lease)
            raise
        slot = Slot(shape, principal, grant, channel_id)
        slot.renewed_s = self._clock.monotonic()
        self._held[channel_id] = slot
        self._some.set()
        return slot

    @contextlib.contextmanager
    def _grow(self, shape: Shape) -> Iterator[None]:
        """One request per shape at a time: others wait for its outcome instead of queueing behind it."""
        self._growing.add(shape)
        try:
            yield
        finally:
            self._growing.discard(shape)

    async def _give_up_one(self, shape: Shape) -> None:
        other = next((slots[0] for kind, slots in self._idle.items() if kind != shape and slots), None)
        if other is not None:
            await self.discard(other)

    async def _renew(self) -> None:
        now_s = self._clock.monotonic()
        due = [slot for slot in self._held.values() if now_s - slot.renewed_s > slot.grant.lease_s / 3]
        for slot in due:
            try:
                await self._source.renew(slot.principal, (slot.lease,))
                slot.renewed_s = now_s
            except IsthmusError as error:
                _log.warning("cannot renew", lease=slot.lease, why=str(error))

    def _idle_too_long(self) -> list[Slot]:
        now_s = self._clock.monotonic()
        return [slot for slots in self._idle.values() for slot in slots if now_s - slot.idle_since_s > IDLE_S]

    def _remove(self, slot: Slot) -> None:
        self._held.pop(slot.channel_id, None)
        idle = self._idle.get(slot.shape, [])
        if slot in idle:
            idle.remove(slot)
        if not idle:
            self._idle.pop(slot.shape, None)
        if not self._held:
            self._some.clear()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETRY_S), self._changed:
                await self._changed.wait()
