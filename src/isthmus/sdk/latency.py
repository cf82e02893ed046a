"""What this client's calls took, by how ready their executor was. Bounded memory.

cold  a lease had to be had first;  warm: the executor slept;  hot: it was spinning for the next call
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from isthmus.core.units import format_seconds

SAMPLES_MAX = 4096  # the latest of each kind; enough for a p99 that means something
HOT_GAP_S = 0.002  # an executor spins this long after a call (node.spin_s by default), then sleeps


class Latency(NamedTuple):
    calls: int
    p50_us: float
    p99_us: float


class LatencyReport(NamedTuple):
    cold: Latency
    warm: Latency
    hot: Latency

    def __str__(self) -> str:
        named = ((name, getattr(self, name)) for name in self._fields)
        return ", ".join(
            f"{name} {format_seconds(one.p50_us / 1e6)} "
            f"(p99 {format_seconds(one.p99_us / 1e6)}, {one.calls} calls)"
            for name, one in named
            if one.calls
        )


class Latencies:
    def __init__(self) -> None:
        self.cold_s: deque[float] = deque(maxlen=SAMPLES_MAX)
        self.warm_s: deque[float] = deque(maxlen=SAMPLES_MAX)
        self.hot_s: deque[float] = deque(maxlen=SAMPLES_MAX)

    def recorders(self) -> tuple[Callable[[float], None], Callable[[float], None], Callable[[float], None]]:
        """Add a sample in seconds: cold, warm, hot."""
        return self.cold_s.append, self.warm_s.append, self.hot_s.append

    def report(self) -> LatencyReport:
        return LatencyReport(_summary(self.cold_s), _summary(self.warm_s), _summary(self.hot_s))


def _summary(samples_s: deque[float]) -> Latency:
    ordered = sorted(samples_s.copy())
    if not ordered:
        return Latency(0, 0.0, 0.0)
    return Latency(len(ordered), _quantile(ordered, 0.5) * 1e6, _quantile(ordered, 0.99) * 1e6)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
