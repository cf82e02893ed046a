"""What is due when, for the scheduler (`dispatch.py`); it gives the time."""

import heapq
import itertools

from isthmus.sdk.work import NEVER, Call, Due, Executor, Pool

Target = Call | Executor | Pool


class Timers:
    """Each fires once. None is withdrawn: whoever it fires for looks whether it still matters."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Due, Target]] = []
        self._order = itertools.count()

    def at(self, when_s: float, due: Due, target: Target) -> None:
        heapq.heappush(self._heap, (when_s, next(self._order), due, target))

    def next_s(self) -> float:
        return self._heap[0][0] if self._heap else NEVER

    def pop_due(self, now_s: float) -> tuple[Due, Target] | None:
        """The earliest that is due by now."""
        if not self._heap or self._heap[0][0] > now_s:
            return None
        _, _, due, target = heapq.heappop(self._heap)
        return due, target
