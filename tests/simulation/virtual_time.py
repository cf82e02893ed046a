"""An event loop whose time is made up: it never waits, it jumps to the next timer. A deadlock is an error at
once.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

from isthmus.core.clock import Clock

EPOCH_S = 1_700_000_000.0


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    """Instead of waiting, moves the loop's time; nothing but the loop's own self-pipe is ever registered."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("deadlock: every task waits, and no timer is set")
        self.now_s += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


class VirtualClock(Clock):
    """Monotonic time is the loop's; the time of day jumps when the simulation says so."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.jump_s = 0.0

    def now(self) -> float:
        return EPOCH_S + self._loop.time() + self.jump_s

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)


def run_virtually(loop: VirtualLoop, main: Coroutine[Any, Any, None]) -> None:
    """Run to the end, then see every task that is left cancelled."""
    try:
        loop.run_until_complete(main)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.close()
