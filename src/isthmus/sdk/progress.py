"""Who waits drives: the thread shell around the scheduler (`dispatch.py`).

One lock (`_lock`) guards the scheduler; one baton (`_baton`) says which thread polls the fabric. A thread
that waits for a future takes the baton and polls until its future is done. A second waiter sleeps on its
future, and the background thread polls for it. When nobody waits and calls are outstanding, the background
thread sleeps in `domain.poll`. Futures are settled outside the lock, so their callbacks may submit again.

Invariant: while a call is outstanding or a timer is set, some thread is polling or will within LINGER_S.
Not here: what to send where (`dispatch.py`), leases (`keeping.py`), values (`calls.py`).
"""

import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

import isthmus.fabric
from isthmus.core.api import LeaseRequest
from isthmus.core.errors import (
    CallCancelledError,
    FabricError,
    IsthmusError,
    LeaseEndedError,
    PeerLostError,
)
from isthmus.core.ids import LeaseId
from isthmus.core.settings import ClientSettings
from isthmus.fabric.channels import Domain, Frame
from isthmus.fabric.frames import Hello, Kind
from isthmus.sdk import dispatch
from isthmus.sdk.calls import Payload
from isthmus.sdk.dispatch import Call, Dispatch, Executor, Pool
from isthmus.sdk.futures import Future
from isthmus.sdk.keeping import Keeper, with_count
from isthmus.sdk.latency import Latencies
from isthmus.sdk.links import Link
from isthmus.sdk.supply import Holding, Supply

log = logging.getLogger("isthmus.sdk")

LINGER_S = 0.001  # how long the background thread leaves the fabric to a thread that may wait again at once
LINGERS_MAX = 50  # idle rounds before the background thread parks until rung
DASH_WAIT_S = 0.002  # how long a thread waits for another's short call before it queues its own
POLL_S_MAX = 1.0  # one sleep of a driver; anything that matters wakes it
BACKLOG_POLL_S = 0.001  # ... while a channel had no room for a frame
FOLLOW_S = 0.05  # a waiter that does not drive looks again after this, should all drivers have left
IDLE_LOOK_S = 0.5  # between two looks at idle executors: the next call must not be sent to a dead one
CONNECT_TIMEOUT_S = 5.0
ROOM_IDLE_S = 1.0  # a durable call takes the cores of executors idle for longer, not of busy or hot ones
FRAMES_AT_ONCE = 64  # handled between two looks at timers

Settlement = tuple[Payload, Frame | None, BaseException | None]


class Engine:
    """Everything a Site needs that must outlive it until its last call is done."""

    def __init__(self, supply: Supply, settings: ClientSettings) -> None:
        self.settings = settings
        self.core = Dispatch()
        self.keeper = Keeper(supply, self._connect)
        self.keeper.bind(self)
        self.latencies = Latencies()
        self.cold, self.warm, self.hot = self.latencies.recorders()
        self.dashing = False  # a thread holds the baton for one short call on the shortest path
        self.numbers = itertools.count(1)
        self.baton = threading.Lock()
        self.forked = False
        self.closed = False
        self._retired: Callable[[], None] | None = None
        self._lock = threading.RLock()
        self._domain: Domain | None = None
        self._executors: dict[int, Executor] = {}
        self._backlogged: set[Link] = set()
        self._gate = threading.Lock()
        self.guests = 0  # threads that want the fabric for themselves
        self._preempted = False  # a waiter asks the background thread for the baton
        self._followers = 0
        self._polling = False  # the background thread holds the baton
        self._asleep_until_s = 0.0
        self._driven_s = 0.0
        self._parked = True
        self._doomed: deque[Link] = deque()  # channels to close
        self._dropped: deque[Future[Any] | Pool] = deque()
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # calls ------------------------------------------------------------------------
    def take_baton_to_dash(self) -> bool:
        """For one short call. Waits for another such call, but not for a thread that drives for itself."""
        return self.baton.acquire(timeout=DASH_WAIT_S) if self.dashing else self._take_baton()

    def submit(self, call: Call) -> None:
        """Raises LeaseEndedError when the site object is closed."""
        with self._lock:
            self._check_open()
            self.core.submit(call, monotonic())
            settled = self._carry_out()
        self._settle(settled)
        self._ring_if_parked()
        if call.deadline_s < self._asleep_until_s and self._domain is not None:
            self._domain.wake()

    def adopt(self, call: Call, executor: Executor) -> None:
        """Take over a call that was sent on the shortest path and is not answered yet."""
        with self._lock:
            self.core.adopt(call, executor)
            self.core.resume(executor.pool, monotonic())
            settled = self._carry_out()
        self._settle(settled)
        self._ring_if_parked()

    def make_room(self) -> None:
        """Give back what is idle: the site is about to need cores for us (a durable call)."""
        with self._lock:
            self.core.release_idle(ROOM_IDLE_S, monotonic())
            settled = self._carry_out()
        self._settle(settled)

    def resume(self, pool: Pool) -> None:
        """Calls were queued while a thread claimed an executor for itself."""
        with self._lock:
            self.core.resume(pool, monotonic())
            settled = self._carry_out()
        self._settle(settled)

    def receive(self, frame: Frame) -> None:
        settled: list[Settlement] = []
        self._on_frame(frame, settled)
        self._settle(settled)

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
                self.core.effects.append(dispatch.Release(executor))
            pool.executors.clear()
            pool.retired = True
            self.core.pools.pop(pool.name, None)
            settled = self._carry_out()
        self._settle(settled)

    def cancel_queued(self, pool: Pool) -> list[Future[Any]]:
        with self._lock:
            calls = self.core.cancel_queued(pool, keep_oldest=True)
        futures = [call.payload.future for call in calls if isinstance(call.payload, Payload)]
        return [future for future in futures if future is not None]

    # Driver, for futures ------------------------------------------------------------------------
    def wait(self, future: Future[Any], deadline_s: float | None) -> None:
        self.drive_until(future.done, deadline_s, future.rest)

    def drive_until(
        self, done: Callable[[], bool], deadline_s: float | None, rest: Callable[[float], None]
    ) -> None:
        """Drive, or `rest` while another thread drives, until done or the monotonic deadline."""
        while not done() and (deadline_s is None or monotonic() < deadline_s):
            if self.guests:
                with self._gate:
                    continue  # a guest holds the gate for as long as it needs the fabric
            if self._take_baton():
                try:
                    self._drive(done, deadline_s)
                finally:
                    self._give_baton()
            else:
                self._rest(rest, deadline_s)

    def follow(self, future: Future[Any]) -> None:
        self._followers += 1
        future.add_done_callback(self._unfollow)
        self._bell.put(None)

    def cancel(self, future: Future[Any]) -> bool:
        call = future.call
        if not isinstance(call, Call):
            return False
        with self._lock:
            cancelled = self.core.cancel(call, monotonic())
            settled = self._carry_out()
        self._settle(settled)
        self._ring_if_parked()
        if self._domain is not None:
            self._domain.wake()
        return cancelled

    # Source, for streams ------------------------------------------------------------------------
    def grant(self, future: Future[Any], items: int) -> None:
        call = future.call
        assert isinstance(call, Call)
        with self._lock:
            for executor in call.pool.executors.values():
                if call.number in executor.inflight:
                    self._grant(executor, call, items)

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

    def break_pool(self, pool: Pool, error: BaseException) -> None:
        """Fail all calls of a pool, now and later, with this error."""
        with self._lock:
            self.core.break_pool(pool, error)
            settled = self._carry_out()
        self._settle(settled)

    # Events, for the keeper ------------------------------------------------------------------------
    def granted(self, pool: Pool, links: list[Link]) -> None:
        with self._lock:
            executors = [Executor(link.holding.executor, pool, link) for link in links]
            for executor, link in zip(executors, links, strict=True):
                self._executors[link.channel.id] = executor
            self.core.granted(pool, executors, monotonic())
            settled = self._carry_out()
        self._settle(settled)
        self._nudge()

    def refused(self, pool: Pool, error: IsthmusError) -> None:
        with self._lock:
            self.core.refused(pool, error, monotonic())
            settled = self._carry_out()
        self._settle(settled)
        self._nudge()

    def explained(self, call: Call, error: BaseException) -> None:
        with self._lock:
            self.core.explained(call, error, monotonic())
            settled = self._carry_out()
        self._settle(settled)
        self._nudge()

    def drained(self, lease: LeaseId) -> None:
        with self._lock:
            for executor in list(self._executors.values()):
                if _link(executor).holding.lease == lease:
                    _link(executor).open = False
                    self.core.drained(executor)
            settled = self._carry_out()
        self._settle(settled)

    # life ------------------------------------------------------------------------
    def open(self) -> Domain:
        """The domain, opened with the first use."""
        if self._domain is None:
            with self._lock:
                if self._domain is None:
                    self._domain = isthmus.fabric.open_domain()
        return self._domain

    def retire(self, after: Callable[[], None]) -> None:
        """The user dropped the Site: end when the last call is done. Lock-free: a finalizer calls it."""
        self._retired = after
        self._bell.put(None)
        self._start_thread_if_none()

    def close(self) -> None:
        """End now: cancel what is outstanding, give everything back. Idempotent."""
        with self._lock:
            if self.closed or self.forked:
                return
            self.closed = True
            pending = self._abandon_all()
        for future in pending:
            future.settle_cancelled()
        if self._domain is not None:
            self._domain.wake()
        self._bell.put(None)
        self.keeper.close()
        self._close_domain()

    def _abandon_all(self) -> list[Future[Any]]:
        calls: list[Call] = []
        for pool in self.core.pools.values():
            calls += self.core.cancel_queued(pool)
            for executor in pool.executors.values():
                calls += executor.inflight.values()
                self._interrupt_first(executor)
        payloads = [call.payload for call in calls]
        return [
            payload.future
            for payload in payloads
            if isinstance(payload, Payload) and payload.future is not None
        ]

    def _interrupt_first(self, executor: Executor) -> None:
        for number in list(executor.inflight)[:1]:
            try:
                _link(executor).interrupt(number, b"cancel")
            except FabricError as error:
                log.debug("could not interrupt %s: %s", executor.name, error)

    def _close_domain(self) -> None:
        if self._domain is None:
            return
        with self.exclusive():
            for link in (*self._doomed, *map(_link, self._executors.values())):
                link.channel.close()
            self._domain.close()

    def _check_open(self) -> None:
        if self.forked:
            raise FabricError(
                "this Site was opened before a fork; call isthmus.connect() in the child process"
            )
        if self.closed:
            raise LeaseEndedError("this Site is closed; open another with isthmus.connect()")

    # driving ------------------------------------------------------------------------
    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Have the fabric for oneself, for what blocks it (connect, close). Drivers step aside."""
        with self._gate:
            self.guests += 1
            try:
                while not self._knock():
                    continue
            finally:
                self.guests -= 1
            try:
                yield
            finally:
                self.baton.release()

    def _knock(self) -> bool:
        """Ask whoever polls for the baton; again and again, for it may have begun to poll after the last time."""
        if self._domain is not None:
            self._domain.wake()
        return self.baton.acquire(timeout=FOLLOW_S)

    def _take_baton(self) -> bool:
        if self.baton.acquire(blocking=False):
            return True
        if self._polling and not self._followers and self._domain is not None:
            self._preempted = True
            self._domain.wake()
            return self.baton.acquire(timeout=FOLLOW_S)
        return False

    def _give_baton(self) -> None:
        self._driven_s = monotonic()
        self.baton.release()
        if self._followers or self._parked:
            self._bell.put(None)

    def _drive(self, done: Callable[[], bool], deadline_s: float | None) -> None:
        while not done() and not self.closed and not self.guests:
            now_s = monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                return
            self.step(now_s, deadline_s, self.settings.spin_s)

    def step(self, now_s: float, deadline_s: float | None, spin_s: float) -> None:
        """Poll once, for as long as nothing else is due, and handle what came. The caller holds the baton."""
        limit_s = now_s + (BACKLOG_POLL_S if self._backlogged else POLL_S_MAX)
        until_s = min(limit_s, self.core.next_timer_s(), limit_s if deadline_s is None else deadline_s)
        self._asleep_until_s = until_s
        domain = self.open()
        while self._doomed:
            self._doomed.popleft().channel.close()
        frame = domain.poll(max(until_s - now_s, 0.0), spin_s)
        self._asleep_until_s = 0.0
        if frame is not None:
            self._receive_all(domain, frame)
        elif monotonic() >= self.core.next_timer_s():
            self._tick()
        if self._backlogged:
            self._flush()

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
            settled = self._carry_out()
        self._settle(settled)

    def _flush(self) -> None:
        with self._lock:
            for link in list(self._backlogged):
                try:
                    link.flush()
                except PeerLostError:
                    self._backlogged.discard(link)  # its LOST frame follows
                if not link.backlogged:
                    self._backlogged.discard(link)

    def _rest(self, rest: Callable[[float], None], deadline_s: float | None) -> None:
        self._followers += 1
        try:
            self._bell.put(None)
            rest(FOLLOW_S if deadline_s is None else min(FOLLOW_S, max(deadline_s - monotonic(), 0.0)))
        finally:
            self._followers -= 1

    def _unfollow(self, _: object) -> None:
        self._followers -= 1

    # the background thread ------------------------------------------------------------------------
    def _ring_if_parked(self) -> None:
        if self._parked:
            self._parked = False
            self._bell.put(None)
        self._start_thread_if_none()

    def _nudge(self) -> None:
        """After a change that no frame announced: let the driver look at its futures and timers again."""
        self._bell.put(None)
        if self._domain is not None and not self.closed:
            self._domain.wake()

    def _start_thread_if_none(self) -> None:
        if self._thread is None and not self.closed:
            self._thread = threading.Thread(target=self._background, name="isthmus.progress", daemon=True)
            self._thread.start()

    def _background(self) -> None:
        idle_rounds = 0
        while not self.closed:
            self._parked = idle_rounds >= LINGERS_MAX
            with suppress(queue.Empty):
                self._bell.get(timeout=self._park_s() if self._parked else LINGER_S)
            for _ in range(len(self._dropped)):
                self._clean(self._dropped.popleft())
            if self._retired is not None and not self.core.outstanding:
                self.close()
                self._retired()
                return
            idle_rounds = 0 if self.core.outstanding or self.core.abandoned else idle_rounds + 1
            if self._due() and self.baton.acquire(blocking=False):
                self._poll_in_background()

    def _clean(self, dropped: Future[Any] | Pool) -> None:
        if isinstance(dropped, Pool) and dropped.closing and dropped.busy:
            self._dropped.append(dropped)
        elif isinstance(dropped, Pool):
            self.retire_pool(dropped)
        else:
            dropped.cancel()

    def _park_s(self) -> float | None:
        """Parked, it only looks now and then whether an idle executor died or a timer is due."""
        if not self._executors and self.core.next_timer_s() == dispatch.NEVER:
            return None
        return min(max(self.core.next_timer_s() - monotonic(), 0.0), IDLE_LOOK_S)

    def _due(self) -> bool:
        if self.closed or self.guests:
            return False
        if not self.core.outstanding and not self.core.abandoned:
            return self._parked or bool(self._doomed) or monotonic() >= self.core.next_timer_s()
        return bool(self._followers) or monotonic() - self._driven_s > LINGER_S

    def _poll_in_background(self) -> None:
        self._polling, self._preempted = True, False
        try:
            while True:
                if self.core.outstanding or self.core.abandoned:
                    self.step(monotonic(), None, 0.0)
                else:
                    now_s = monotonic()
                    self.step(now_s, now_s, 0.0)
                if (
                    self._preempted
                    or self.guests
                    or self.closed
                    or not (self.core.outstanding or self.core.abandoned)
                ):
                    return
        finally:
            self._polling = False
            self._driven_s = monotonic()
            self.baton.release()

    # frames and effects ------------------------------------------------------------------------
    def _on_frame(self, frame: Frame, settled: list[Settlement]) -> None:
        executor = self._executors.get(frame.channel_id)
        if executor is None:
            return
        kind = frame.kind
        error = isthmus.fabric.codec.decode_error(frame.meta, frame.data) if kind == Kind.ERROR else None
        with self._lock:
            now_s = monotonic()
            if kind == Kind.RESULT:
                call = self.core.answered(executor, frame.call_id, now_s)
                if call is not None:
                    settled.append((_payload(call), frame, None))
            elif kind == Kind.ERROR:
                assert error is not None
                self.core.failed(executor, frame.call_id, error, now_s)
            elif kind == Kind.YIELD:
                self._on_item(executor, frame)
            elif kind == Kind.REFUSED:
                self.core.turned_back(executor, frame.call_id, now_s)
            elif kind in (Kind.LOST, Kind.GOODBYE):
                self._on_lost(executor, frame.channel_id, now_s)
            settled += self._carry_out()

    def _on_item(self, executor: Executor, frame: Frame) -> None:
        call = executor.inflight.get(frame.call_id)
        if call is not None and not call.abandoned:
            call.replayable = False
            items = _payload(call).items
            if items is not None:
                items.put(frame)

    def _grant(self, executor: Executor, call: Call, items: int) -> None:
        link = _link(executor)
        try:
            link.grant(call.number, _payload(call).definition.number, items)
        except PeerLostError:
            return  # its LOST frame follows
        if link.backlogged:
            self._backlogged.add(link)

    def _on_lost(self, executor: Executor, channel_id: int, now_s: float) -> None:
        del self._executors[channel_id]
        _link(executor).open = False
        self._backlogged.discard(_link(executor))
        self._doom(_link(executor))
        self.core.lost(executor, now_s)

    def _carry_out(self) -> list[Settlement]:
        settled: list[Settlement] = []
        while self.core.effects:
            effects, self.core.effects = self.core.effects, []
            for effect in effects:
                match effect:
                    case dispatch.Send(executor, call):
                        self._send(executor, call)
                    case dispatch.Settle(call, error):
                        settled.append((_payload(call), None, error))
                    case dispatch.Request(pool, leases, wait_s):
                        assert isinstance(pool.request, LeaseRequest)
                        self.keeper.request(pool, with_count(pool.request, leases, wait_s))
                    case dispatch.Examine(executor, call):
                        self.keeper.examine(executor, call)
                    case dispatch.Interrupt(executor, call, reason):
                        self._interrupt(executor, call, reason)
                    case dispatch.Kill(executor):
                        self.keeper.kill(_link(executor))
                    case dispatch.Release(executor):
                        self._release(executor)
        return settled

    def _send(self, executor: Executor, call: Call) -> None:
        link, payload = _link(executor), _payload(call)
        deadline_ns = 0
        if call.deadline_s != dispatch.NEVER:
            deadline_ns = max(int((call.deadline_s - call.sent_s) * 1e9), 1)
        if payload.future is not None:
            payload.future.mark_running()
        try:
            link.define(payload.definition)
            link.call(call.number, payload.definition.number, payload.meta, payload.data, deadline_ns)
        except PeerLostError:
            self.core.unsent(executor, call, monotonic())
        except (FabricError, ValueError) as error:
            self.core.failed(executor, call.number, error, monotonic())
        if link.backlogged:
            self._backlogged.add(link)
            if self._domain is not None:
                self._domain.wake()

    def _interrupt(self, executor: Executor, call: Call, reason: bytes) -> None:
        try:
            _link(executor).interrupt(call.number, reason)
        except FabricError as error:
            log.debug("could not interrupt a call on %s: %s", executor.name, error)

    def _release(self, executor: Executor) -> None:
        link = _link(executor)
        link.open = False
        if self._executors.pop(link.channel.id, None) is not None:
            self._doom(link)
        self._backlogged.discard(link)
        self.keeper.release(link)

    def _doom(self, link: Link) -> None:
        """Closing a channel is for the thread that polls its domain."""
        self._doomed.append(link)
        self._nudge()

    def _cancel_payload(self, call: Call) -> None:
        self.core.effects.append(
            dispatch.Settle(call, CallCancelledError("the call's executor was given back"))
        )

    def _connect(self, holding: Holding, hello: Hello) -> Link:
        domain = self.open()
        with self.exclusive():
            self._check_open()
            return Link(domain.connect(holding.address, hello, CONNECT_TIMEOUT_S), holding)

    def _settle(self, settled: list[Settlement]) -> None:
        for payload, frame, error in settled:
            payload.settle(frame, error)


def _link(executor: Executor) -> Link:
    assert isinstance(executor.link, Link)
    return executor.link


def _payload(call: Call) -> Payload:
    assert isinstance(call.payload, Payload)
    return call.payload
