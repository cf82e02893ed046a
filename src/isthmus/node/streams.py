"""Generators: each item leaves as a YIELD frame, as fast as the client takes them.

Invariant: at most `credits` items are unacknowledged; the client grants more with YIELD frames of its own.
The generator is closed when its call ends, however it ends, so that its `finally` blocks run on the executor.
"""

from collections.abc import AsyncGenerator, Callable
from typing import Any

from isthmus.node.functions import Loop, Stream

STREAM_CREDITS = 16  # window of a call that names none
_END = object()


class Window:
    """Items that may still be sent. `grant` is called when the client's YIELD frame arrives."""

    __slots__ = ("open",)

    def __init__(self, credits: int) -> None:
        self.open = credits or STREAM_CREDITS

    def grant(self, credits: int) -> None:
        self.open += credits


class Items:
    """A generator of either colour behind one `next`; its return value is `value` at the end."""

    def __init__(self, stream: Stream, loop: Loop) -> None:
        self._stream = stream
        self._loop = loop
        self.value: Any = None

    def next(self) -> Any:
        """The next item, or END."""
        if isinstance(self._stream, AsyncGenerator):
            return self._loop.run(_step(self._stream))
        try:
            return next(self._stream)
        except StopIteration as stop:
            self.value = stop.value
            return _END

    def close(self) -> None:
        if isinstance(self._stream, AsyncGenerator):
            self._loop.run(_close(self._stream))
        elif hasattr(self._stream, "close"):
            self._stream.close()


def send_all(items: Items, window: Window, guard: Callable[..., Any], send: Callable[[Any], None],
             wait: Callable[[], None]) -> Any:  # fmt: skip
    """Drain the generator and give its return value.

    guard  runs the user's code so that it can be interrupted
    send   sends one item
    wait   returns when a frame came in; raises CallInterrupted when the call must stop
    """
    try:
        while (item := guard(items.next)) is not _END:
            while window.open <= 0:
                wait()
            window.open -= 1
            send(item)
    finally:
        guard(items.close)
    return items.value


async def _step(stream: AsyncGenerator[Any, None]) -> Any:
    try:
        return await anext(stream)
    except StopAsyncIteration:
        return _END


async def _close(stream: AsyncGenerator[Any, None]) -> None:
    await stream.aclose()
