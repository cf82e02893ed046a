"""Time as a dependency: real in the site, virtual in simulations."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Seconds since the epoch; may jump. For records and deadlines that leave this process."""
        ...

    def monotonic(self) -> float:
        """Seconds that only grow. For intervals within this process."""
        ...

    async def sleep(self, duration_s: float) -> None: ...


class SystemClock:
    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
