"""The client's end of a generator that runs elsewhere.

Invariant: at most STREAM_WINDOW items wait here; items taken let the executor send as many more. Closing, or
dropping, the stream cancels the call. One thread or asyncio task at a time iterates.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

from isthmus.fabric import codec
from isthmus.fabric.channels import Frame
from isthmus.sdk.futures import Future

R = TypeVar("R")

STREAM_WINDOW = 16  # items an executor may send unasked; equals its own default
_GRANT_ITEMS = STREAM_WINDOW // 2  # taken before as many are asked for: half the frames, and no stall


class Source(Protocol):
    """The engine, as a stream needs it."""

    def drive_until(
        self, done: Callable[[], bool], deadline_s: float | None, rest: Callable[[float], None]
    ) -> None: ...
    def follow(self, future: Future[Any]) -> None: ...
    def grant(self, future: Future[Any], items: int) -> None: ...
    def drop(self, future: Future[Any]) -> None: ...


class Inbox:
    """Items that have come and were not taken yet. The engine fills it and keeps it, not the stream."""

    def __init__(self) -> None:
        self._frames: deque[Frame | None] = deque()
        self._arrival = threading.Condition()
        self._listener: Callable[[], object] | None = None

    def put(self, frame: Frame | None) -> None:
        """None: nothing more will come."""
        with self._arrival:
            self._frames.append(frame)
            self._arrival.notify()
            if self._listener is not None:
                self._listener()

    def ready(self) -> bool:
        return bool(self._frames)

    def take(self) -> Frame | None:
        return self._frames.popleft()

    def rest(self, duration_s: float) -> None:
        with self._arrival:
            if not self._frames:
                self._arrival.wait(duration_s)

    async def arrival(self) -> None:
        """Return once there is something to take."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        with self._arrival:
            if self._frames:
                return
            self._listener = lambda: loop.call_soon_threadsafe(event.set)
        try:
            await event.wait()
        finally:
            self._listener = None


class Stream(Generic[R], Iterator[R], AsyncIterator[R]):
    """Iterate with `for` or `async for`; a context manager that closes."""

    def __init__(self, source: Source, future: Future[None], inbox: Inbox) -> None:
        self._source = source
        self._future = future
        self._inbox = inbox
        self._taken = 0
        self._followed = False
        self._ended = False
        future.add_done_callback(lambda _: inbox.put(None))

    def __next__(self) -> R:
        if self._ended:
            raise StopIteration
        self._source.drive_until(self._inbox.ready, None, self._inbox.rest)
        frame = self._inbox.take()
        if frame is None:
            self._finish()
            raise StopIteration
        return self._open(frame)

    async def __anext__(self) -> R:
        if self._ended:
            raise StopAsyncIteration
        if not self._inbox.ready():
            self._follow()
            await self._inbox.arrival()
        frame = self._inbox.take()
        if frame is None:
            self._finish()
            raise StopAsyncIteration
        return self._open(frame)

    def close(self) -> None:
        """Stop the generator; its `finally` blocks run on the executor."""
        if not self._ended:
            self._ended = True
            self._future.cancel()

    async def aclose(self) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._ended and not self._future.done():
            self._source.drop(self._future)

    def _follow(self) -> None:
        if not self._followed:
            self._followed = True
            self._source.follow(self._future)

    def _finish(self) -> None:
        """The last frame was taken: end, or raise what the generator raised."""
        self._ended = True
        self._future.result()

    def _open(self, frame: Frame) -> R:
        self._taken += 1
        if self._taken % _GRANT_ITEMS == 0:
            self._source.grant(self._future, _GRANT_ITEMS)
        value: R = codec.decode_value(frame.meta, frame.data)
        return value
