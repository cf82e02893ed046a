"""One future for every way of waiting: threads, asyncio, `concurrent.futures.wait` and `as_completed`.

Invariant: it is settled exactly once. Who waits for it drives the fabric (`progress.py`), so a waiting
thread needs no other thread to get its answer.
"""

import asyncio
import concurrent.futures
import time
from collections.abc import Generator
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, PENDING, RUNNING
from typing import Any, Protocol, TypeVar

from isthmus.core.ids import CallId

T = TypeVar("T")


class Driver(Protocol):
    """Makes progress on behalf of a waiting thread."""

    def wait(self, future: "Future[Any]", deadline_s: float | None) -> None:
        """Return when the future is done or the monotonic deadline has passed."""
        ...

    def follow(self, future: "Future[Any]") -> None:
        """Somebody waits without driving (asyncio): see to it that somebody else drives."""
        ...

    def cancel(self, future: "Future[Any]") -> bool:
        """Withdraw the call. False: it has ended."""
        ...


class Future(concurrent.futures.Future[T]):
    """The outcome of one call.

    call_id  of a durable call, else ""
    """

    def __init__(self, driver: Driver | None = None, call_id: CallId = CallId("")) -> None:
        super().__init__()
        self.driver = driver
        self.call_id = call_id
        self.call: object = None

    def result(self, timeout: float | None = None, *, timeout_s: float | None = None) -> T:
        """The function's value, or its exception. Raises TimeoutError when it is not there in time."""
        limit_s = timeout if timeout_s is None else timeout_s
        try:
            return super().result(self._drive(limit_s))
        except TimeoutError:
            if not self.done():
                raise TimeoutError(_too_early(limit_s)) from None
        return super().result(0)  # the function's own error, or what came at the last moment

    def exception(
        self, timeout: float | None = None, *, timeout_s: float | None = None
    ) -> BaseException | None:
        limit_s = timeout if timeout_s is None else timeout_s
        try:
            return super().exception(self._drive(limit_s))
        except TimeoutError:
            if not self.done():
                raise TimeoutError(_too_early(limit_s)) from None
        return super().exception(0)  # it came at the last moment

    def cancel(self) -> bool:
        """Take the call back, queued or running: running code gets an exception, then its process is
        killed.
        """
        if self.driver is not None and not self.done() and self.driver.cancel(self):
            return self.settle_cancelled()
        return self.cancelled() or super().cancel()

    def settle_cancelled(self) -> bool:
        """Mark as cancelled, whatever the state before. False: it was done."""
        with self._condition:
            if self._state in (CANCELLED, CANCELLED_AND_NOTIFIED):
                return True
            if self._state == FINISHED:
                return False
            self._state = CANCELLED_AND_NOTIFIED
            for waiter in self._waiters:
                waiter.add_cancelled(self)
            self._condition.notify_all()
        self._invoke_callbacks()  # type: ignore[attr-defined]
        return True

    def mark_running(self) -> None:
        """Its call is on its way. Under the engine's lock, as `cancel` is."""
        if self._state == PENDING:
            self._state = RUNNING

    def await_end(self) -> None:
        """Return when it is done, however it ended."""
        if self.driver is not None:
            self.driver.wait(self, None)

    def rest(self, duration_s: float) -> None:
        """Sleep until it is done or the time has passed, driving nothing."""
        with self._condition:
            if not self.done():
                self._condition.wait(duration_s)

    def __await__(self) -> Generator[Any, None, T]:
        if self.driver is not None and not self.done():
            self.driver.follow(self)
        return asyncio.wrap_future(self).__await__()

    def _drive(self, timeout_s: float | None) -> float | None:
        """Wait by driving; gives what is left of the time for the base class's own wait."""
        if self.driver is None or self.done():
            return timeout_s
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self.driver.wait(self, deadline_s)
        return None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0)


def outcome(future: Future[T]) -> T:
    """The outcome of a call that nobody else will wait for: it is cancelled when the wait is interrupted."""
    try:
        return future.result()
    except BaseException:
        if not future.done():
            future.cancel()
        raise
    finally:
        del future  # its traceback would keep it, and what it holds, alive


def _too_early(limit_s: float | None) -> str:
    return f"no result within {limit_s or 0.0:g} s; the call goes on: wait again, or cancel() it"
