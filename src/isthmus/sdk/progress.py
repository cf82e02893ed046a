"""Who waits drives: which thread polls the fabric, and when the background thread does it instead.

One baton says who polls. A thread that waits for a future takes it and polls until its future is done. A
second waiter sleeps on its future, and the background thread polls for it. When nobody waits and work is
outstanding, the background thread sleeps in `domain.poll`; when there is none, it only looks now and then.

Invariant: while work is outstanding or a timer is set, some thread is polling or will within LINGER_S.
Not here: what is done with a frame (`engine.py`).
"""

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

import isthmus.fabric
from isthmus.fabric.channels import Domain, Frame
from isthmus.sdk.futures import Future
from isthmus.sdk.work import NEVER

LINGER_S = 0.001  # how long the background thread leaves the fabric to a thread that may wait again at once
LINGERS_MAX = 50  # rounds without work, or with another driver, before the background thread parks until rung
DASH_WAIT_S = 0.002  # how long a thread waits for another's short call before it queues its own
POLL_S_MAX = 1.0  # one sleep of a driver; anything that matters wakes it
BACKLOG_POLL_S = 0.001  # ... while a channel had no room for a frame
OPEN_AFTER_S = 0.005  # opening UCX holds the GIL for milliseconds: the first request for a lease goes first
FOLLOW_S = 0.05  # a waiter that does not drive looks again after this, should all drivers have left
IDLE_LOOK_S = 0.5  # between two looks at idle executors: the next call must not be sent to a dead one


class Progress(ABC):
    """The thread half of an Engine.

    spin_s    how long a waiting thread spins for a frame before it sleeps, if the last one came that soon:
              else it would take the cores that the answer needs
    baton     held by the thread that polls; `dashing` while it is held for one short call only
    guests    threads that want the fabric for themselves; drivers step aside for them
    """

    def __init__(self, spin_s: float) -> None:
        self.baton = threading.Lock()
        self.dashing = False
        self.guests = 0
        self.closed = False
        self._spin_s = spin_s
        self._domain: Domain | None = None
        self._opening = threading.Lock()
        self._gate = threading.Lock()  # held by a guest for as long as it needs the fabric
        self._preempted = False  # a waiter asks the background thread for the baton
        self._followers = 0
        self._polling = False  # the background thread holds the baton
        self._asleep_until_s = 0.0
        self._driven_s = 0.0
        self._soon = True  # the last frame came while it was worth spinning: the next one may, too
        self._parked = True
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()  # the only lock a finalizer may touch
        self._thread: threading.Thread | None = None

    # what an engine adds ------------------------------------------------------------------------
    @abstractmethod
    def _is_working(self) -> bool:
        """Answers are expected."""

    @abstractmethod
    def _has_idle_executors(self) -> bool: ...

    @abstractmethod
    def _has_backlog(self) -> bool: ...

    @abstractmethod
    def _next_timer_s(self) -> float: ...

    @abstractmethod
    def _before_poll(self) -> None:
        """Whatever only the polling thread may do."""

    @abstractmethod
    def _receive_all(self, domain: Domain, first: Frame) -> None: ...

    @abstractmethod
    def _tick(self) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...

    @abstractmethod
    def _clean_up(self) -> bool:
        """Tend to what users dropped. True: this engine has ended."""

    # waiting ------------------------------------------------------------------------
    def wait(self, future: Future[Any], deadline_s: float | None) -> None:
        self.drive_until(future.done, deadline_s, future.rest)

    def drive_until(
        self, done: Callable[[], bool], deadline_s: float | None, rest: Callable[[float], None]
    ) -> None:
        """Drive, or `rest` while another thread drives, until done or the monotonic deadline."""
        if self._domain is None and not done():
            rest(OPEN_AFTER_S)
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

    def _unfollow(self, _: object) -> None:
        self._followers -= 1

    def _rest(self, rest: Callable[[float], None], deadline_s: float | None) -> None:
        self._followers += 1
        try:
            self._bell.put(None)
            rest(FOLLOW_S if deadline_s is None else min(FOLLOW_S, max(deadline_s - monotonic(), 0.0)))
        finally:
            self._followers -= 1

    # the baton ------------------------------------------------------------------------
    def take_baton_to_dash(self) -> bool:
        """For one short call. Waits for another such call, but not for a thread that drives for itself."""
        return self.baton.acquire(timeout=DASH_WAIT_S) if self.dashing else self._take_baton()

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
        """Ask whoever polls for the baton; again and again, for it may have begun to poll after the last
        time.
        """
        self._wake()
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

    # driving ------------------------------------------------------------------------
    def open(self) -> Domain:
        """The domain, opened with the first use."""
        if self._domain is None:
            with self._opening:
                if self._domain is None:
                    self._domain = isthmus.fabric.open_domain()
        return self._domain

    def _drive(self, done: Callable[[], bool], deadline_s: float | None) -> None:
        while not done() and not self.closed and not self.guests:
            now_s = monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                return
            self.step(now_s, deadline_s, self._spin_s if self._soon else 0.0)
            self._soon = monotonic() - now_s < self._spin_s

    def step(self, now_s: float, deadline_s: float | None, spin_s: float) -> None:
        """Poll once, for as long as nothing else is due, and handle what came. The caller holds the baton."""
        limit_s = now_s + (BACKLOG_POLL_S if self._has_backlog() else POLL_S_MAX)
        until_s = min(limit_s, self._next_timer_s(), limit_s if deadline_s is None else deadline_s)
        self._asleep_until_s = until_s
        domain = self.open()
        self._before_poll()
        frame = domain.poll(max(until_s - now_s, 0.0), spin_s)
        self._asleep_until_s = 0.0
        if frame is not None:
            self._receive_all(domain, frame)
        elif monotonic() >= self._next_timer_s():
            self._tick()
        if self._has_backlog():
            self._flush()

    # the background thread ------------------------------------------------------------------------
    def _ring_if_parked(self) -> None:
        if self._parked:
            self._parked = False
            self._bell.put(None)
        self._start_thread_if_none()

    def _wake(self) -> None:
        """End a poll that sleeps."""
        if self._domain is not None:
            self._domain.wake()

    def _nudge(self) -> None:
        """After a change that no frame announced: let the driver look at its futures and timers again."""
        self._bell.put(None)
        if self._domain is not None and not self.closed:
            self._domain.wake()

    def _start_thread_if_none(self) -> None:
        if self._thread is None and not self.closed:
            self._thread = threading.Thread(target=self._background, name="isthmus.progress", daemon=True)
            self._driven_s = monotonic() + OPEN_AFTER_S
            self._thread.start()

    def _background(self) -> None:
        idle_rounds = 0
        while not self.closed:
            self._parked = idle_rounds >= LINGERS_MAX
            with suppress(queue.Empty):
                self._bell.get(timeout=self._park_s() if self._parked else LINGER_S)
            if self._clean_up():
                return
            needed = self._is_working() and not self.baton.locked()
            idle_rounds = 0 if needed else idle_rounds + 1
            if self._due() and self.baton.acquire(blocking=False):
                self._poll_in_background()

    def _park_s(self) -> float | None:
        """Parked, it looks now and then whether an executor died, a timer is due or a driver left."""
        if self._is_working():
            return FOLLOW_S
        if not self._has_idle_executors() and self._next_timer_s() == NEVER:
            return None
        return min(max(self._next_timer_s() - monotonic(), 0.0), IDLE_LOOK_S)

    def _due(self) -> bool:
        if self.closed or self.guests:
            return False
        if not self._is_working():
            return self._parked or monotonic() >= self._next_timer_s()
        return bool(self._followers) or monotonic() - self._driven_s > LINGER_S

    def _poll_in_background(self) -> None:
        self._polling, self._preempted = True, False
        try:
            while True:
                now_s = monotonic()
                self.step(now_s, None if self._is_working() else now_s, 0.0)
                if self._preempted or self.guests or self.closed or not self._is_working():
                    return
        finally:
            self._polling = False
            self._driven_s = monotonic()
            self.baton.release()
