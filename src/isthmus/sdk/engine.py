"""The shell around the scheduler: what users do and what frames say becomes events, and futures are settled.

One lock guards the scheduler (`dispatch.py`). Futures are settled outside it, so their callbacks may submit
again. Invariant: every effect is carried out before the lock is given back, so the scheduler never runs
ahead of the world. Not here: which thread polls (`progress.py`), leases (`keeping.py`), values (`calls.py`).
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import (
    CallCancelledError,
    FabricError,
    IsthmusError,
    LeaseEndedError,
)
from isthmus.core.ids import LeaseId
from isthmus.core.settings import ClientSettings
from isthmus.fabric import codec
from isthmus.fabric.channels import Domain, Frame
from isthmus.fabric.frames import Hello, Kind
from isthmus.sdk import work
from isthmus.sdk.calls import Payload
from isthmus.sdk.dispatch import Dispatch
from isthmus.sdk.futures import Future
from isthmus.sdk.keeping import Keeper
from isthmus.sdk.latency import Latencies
from isthmus.sdk.links import Link
from isthmus.sdk.outbox import Outbox, Settlement, link_of, payload_of
from isthmus.sdk.progress import Progress
from isthmus.sdk.supply import Holding, Supply
from isthmus.sdk.work import Call, Executor, Pool

log = logging.getLogger("isthmus.sdk")

CONNECT_TIMEOUT_S = 5.0
ROOM_IDLE_S = 1.0  # a durable call takes the cores of executors idle for longer, not of busy or hot ones
FRAMES_AT_ONCE = 64  # handled between two looks at timers


class Engine(Progress):
    """Everything a Site needs that must outlive it until its last call is done."""

    def __init__(self, supply: Supply, settings: ClientSettings) -> None:
        super().__init__(settings.spin_s)
        self.settings = settings
        self.core = Dispatch(settings.capacity_wait_s)
        self.keeper = Keeper(supply, self._connect)
        self.keeper.bind(self)
        self.latencies = Latencies()
        self.cold, self.warm, self.hot = self.latencies.recorders()
        self.numbers = itertools.count(1)
        self.forked = False
        self._retired: Callable[[], None] | None = None
        self._lock = threading.RLock()
        self._out = Outbox(self.core, self.keeper, self._wake, self._nudge)
        self._dropped: deque[Future[Any] | Pool] = deque()

    # calls ------------------------------------------------------------------------
    def submit(self, call: Call) -> None:
        """Raises LeaseEndedError when the site object is closed."""
        with self._lock:
            self._check_open()
            self.core.submit(call, monotonic())
            settled = self._out.carry_out()
        self._settle(settled)
        self._ring_if_parked()
        if call.deadline_s < self._asleep_until_s:
            self._wake()

    def adopt(self, call: Call, executor: Executor) -> None:
        """Take over a call that was sent on the shortest path and is not answered yet."""
        with self._lock:
            self.core.adopt(call, executor)
            self.core.resume(executor.pool, monotonic())
            settled = self._out.carry_out()
        self._settle(settled)
        self._ring_if_parked()

    def resume(self, pool: Pool) -> None:
        """Calls were queued while a thread claimed an executor for itself."""
        with self._lock:
            self.core.resume(pool, monotonic())
            settled = self._out.carry_out()
        self._settle(settled)

    def receive(self, frame: Frame) -> None:
        settled: list[Settlement] = []
        self._on_frame(frame, settled)
        self._settle(settled)

    def cancel(self, future: Future[Any]) -> bool:
        call = future.call
        if not isinstance(call, Call):
            return False
        with self._lock:
            cancelled = self.core.cancel(call, monotonic())
            settled = self._out.carry_out()
        self._settle(settled)
        self._ring_if_parked()
        self._wake()
        return cancelled

    def cancel_queued(self, pool: Pool) -> list[Future[Any]]:
        with self._lock:
            calls = self.core.cancel_queued(pool, keep_oldest=True)
        futures = [call.payload.future for call in calls if isinstance(call.payload, Payload)]
        return [future for future in futures if future is not None]

    def make_room(self, idle_s: float = ROOM_IDLE_S) -> None:
        """Give back what is idle: the site is about to need cores for us (a durable call, a group)."""
        with self._lock:
            self.core.release_idle(idle_s, monotonic())
            settled = self._out.carry_out()
        self._settle(settled)

    # pools ------------------------------------------------------------------------
    def pool(self, name: str, request: LeaseRequest | None, limit: int, sticky: bool = False) -> Pool:
        with self._lock:
            return self.core.pool(name, request, limit, sticky)

    def seat(self, pool: Pool, link: Link) -> None:
        """Put an executor that was taken outside the scheduler (a group's) into its pool."""
        self.granted(pool, [link])

    def retire_pool(self, pool: Pool) -> None:
        """Give back everything of a pool whose user is gone."""
        with self._lock:
            for call in self.core.cancel_queued(pool):
                self._cancel_payload(call)
            for executor in list(pool.executors.values()):
                for call in list(executor.inflight.values()):
                    if self.core.cancel(call, monotonic()):
                        self._cancel_payload(call)
                self.core.effects.append(work.Release(executor))
            pool.executors.clear()
            pool.retired = True
            self.core.pools.pop(pool.name, None)
            settled = self._out.carry_out()
        self._settle(settled)

    def break_pool(self, pool: Pool, error: BaseException) -> None:
        """Fail all calls of a pool, now and later, with this error."""
        with self._lock:
            self.core.break_pool(pool, error)
            settled = self._out.carry_out()
        self._settle(settled)

    # streams, and what users drop ------------------------------------------------------------------------
    def grant(self, future: Future[Any], items: int) -> None:
        call = future.call
        assert isinstance(call, Call)
        with self._lock:
            for executor in call.pool.executors.values():
                if call.number in executor.inflight:
                    self._out.grant(executor, call, items)

    def drop(self, future: Future[Any]) -> None:
        """Nobody will read this any more. Lock-free: a destructor calls it."""
        self._dropped.append(future)
        self._bell.put(None)

    def drop_pool(self, pool: Pool) -> None:
        """Like `drop`, for all calls and executors of a pool."""
        self._dropped.append(pool)
        self._bell.put(None)

    def drop_pool_after_use(self, pool: Pool) -> None:
        """Nobody will add calls to this pool: give it back once those it has are done. Lock-free too."""
        pool.closing = True
        self._dropped.append(pool)
        self._bell.put(None)

    def _clean_up(self) -> bool:
        for _ in range(len(self._dropped)):
            self._clean(self._dropped.popleft())
        if self._retired is None or self.core.outstanding:
            return False
        self.close()
        self._retired()
        return True

    def _clean(self, dropped: Future[Any] | Pool) -> None:
        if isinstance(dropped, Pool) and dropped.closing and dropped.busy:
            self._dropped.append(dropped)
        elif isinstance(dropped, Pool):
            self.retire_pool(dropped)
        else:
            dropped.cancel()

    # events, from the keeper ------------------------------------------------------------------------
    def granted(self, pool: Pool, links: list[Link]) -> None:
        with self._lock:
            now_s = monotonic()
            executors = [
                Executor(link.holding.executor, pool, link, closes_s=_closes_s(link.holding, now_s))
                for link in links
            ]
            for executor, link in zip(executors, links, strict=True):
                self._out.executors[link.channel.id] = executor
            self.core.granted(pool, executors, now_s)
            settled = self._out.carry_out()
        self._settle(settled)
        self._nudge()

    def refused(self, pool: Pool, error: IsthmusError) -> None:
        with self._lock:
            self.core.refused(pool, error, monotonic())
            settled = self._out.carry_out()
        self._settle(settled)
        self._nudge()

    def explained(self, call: Call, error: BaseException) -> None:
        with self._lock:
            self.core.explained(call, error, monotonic())
            settled = self._out.carry_out()
        self._settle(settled)
        self._nudge()

    def drained(self, lease: LeaseId) -> None:
        with self._lock:
            for executor in list(self._out.executors.values()):
                if link_of(executor).holding.lease == lease:
                    link_of(executor).open = False
                    self.core.drained(executor)
            settled = self._out.carry_out()
        self._settle(settled)

    # life ------------------------------------------------------------------------
    def retire(self, after: Callable[[], None]) -> None:
        """The user dropped the Site: end when the last call is done. Lock-free: a finalizer calls it."""
        self._retired = after
        self._bell.put(None)
        self._start_thread_if_none()

    def finish(self) -> None:
        """Return when nothing is outstanding that was left behind by users who are gone."""
        self.drive_until(lambda: not self._owes(), None, time.sleep)

    def _owes(self) -> bool:
        dropped = self._retired is not None and bool(self.core.outstanding)
        return dropped or any(pool.closing and pool.busy for pool in list(self.core.pools.values()))

    def close(self) -> None:
        """End now: cancel what is outstanding, give everything back. Idempotent."""
        with self._lock:
            if self.closed or self.forked:
                return
            self.closed = True
            pending = self._abandon_all()
        for future in pending:
            future.settle_cancelled()
        self._wake()
        self._bell.put(None)
        self.keeper.close()
        self._close_domain()

    def _abandon_all(self) -> list[Future[Any]]:
        calls: list[Call] = []
        for pool in self.core.pools.values():
            calls += self.core.cancel_queued(pool)
            for executor in pool.executors.values():
                calls += executor.inflight.values()
                for number in list(executor.inflight)[:1]:  # the one that may run
                    self._out.interrupt(executor, number, b"cancel")
        payloads = [call.payload for call in calls]
        return [
            payload.future
            for payload in payloads
            if isinstance(payload, Payload) and payload.future is not None
        ]

    def _close_domain(self) -> None:
        if self._domain is None:
            return
        with self.exclusive():
            self._out.close_all()
            self._domain.close()

    def _check_open(self) -> None:
        if self.forked:
            raise FabricError(
                "this Site was opened before a fork; call isthmus.connect() in the child process"
            )
        if self.closed:
            raise LeaseEndedError("this Site is closed; open another with isthmus.connect()")

    def _connect(self, holding: Holding, hello: Hello) -> Link:
        domain = self.open()
        with self.exclusive():
            self._check_open()
            return Link(domain.connect(holding.address, hello, CONNECT_TIMEOUT_S), holding)

    # for the polling thread ------------------------------------------------------------------------
    def _is_working(self) -> bool:
        return bool(self.core.outstanding or self.core.abandoned or self._out.has_doomed)

    def _has_idle_executors(self) -> bool:
        return bool(self._out.executors)

    def _has_backlog(self) -> bool:
        return self._out.has_backlog

    def _next_timer_s(self) -> float:
        return self.core.next_timer_s()

    def _before_poll(self) -> None:
        self._out.close_doomed()

    def _receive_all(self, domain: Domain, first: Frame) -> None:
        settled: list[Settlement] = []
        frame: Frame | None = first
        for _ in range(FRAMES_AT_ONCE):
            if frame is None:
                break
            self._on_frame(frame, settled)
            frame = domain.poll(0.0)
        else:
            if frame is not None:
                self._on_frame(frame, settled)
        self._settle(settled)

    def _tick(self) -> None:
        with self._lock:
            self.core.tick(monotonic())
            settled = self._out.carry_out()
        self._settle(settled)

    def _flush(self) -> None:
        with self._lock:
            self._out.flush()

    # frames in ------------------------------------------------------------------------
    def _on_frame(self, frame: Frame, settled: list[Settlement]) -> None:
        executor = self._out.executors.get(frame.channel_id)
        if executor is None:
            return
        kind = frame.kind
        error = codec.decode_error(frame.meta, frame.data) if kind == Kind.ERROR else None
        with self._lock:
            now_s = monotonic()
            if kind == Kind.RESULT:
                call = self.core.answered(executor, frame.call_id, now_s)
                if call is not None:
                    settled.append((payload_of(call), frame, None))
            elif kind == Kind.ERROR:
                assert error is not None
                self.core.failed(executor, frame.call_id, error, now_s)
            elif kind == Kind.YIELD:
                self._on_item(executor, frame)
            elif kind == Kind.REFUSED:
                self.core.turned_back(executor, frame.call_id, now_s)
            elif kind in (Kind.LOST, Kind.GOODBYE):
                self._out.lost(frame.channel_id)
                self.core.lost(executor, now_s)
            settled += self._out.carry_out()

    def _on_item(self, executor: Executor, frame: Frame) -> None:
        call = executor.inflight.get(frame.call_id)
        if call is not None and not call.abandoned:
            call.replayable = False
            items = payload_of(call).items
            if items is not None:
                items.put(frame)

    # settling ------------------------------------------------------------------------
    def _cancel_payload(self, call: Call) -> None:
        self.core.effects.append(work.Settle(call, CallCancelledError("the call's executor was given back")))

    def _settle(self, settled: list[Settlement]) -> None:
        for payload, frame, error in settled:
            payload.settle(frame, error)


def _closes_s(holding: Holding, now_s: float) -> float:
    return now_s + holding.open_s if holding.open_s else work.NEVER
