"""Summaries of samples: the numbers that reports and promises speak of.

Invariant: pure functions. Percentiles are nearest-rank on all samples of all rounds, so each is a value that
was seen.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_UNITS = {"_us": "µs", "_ms": "ms", "_s": "s", "_per_s": "/s", "_ratio": "×", "_percent": "%", "_mb": "MB"}


@dataclass(frozen=True)
class Summary:
    """All samples of one cell. The spread of the medians in `rounds` is the machine's drift."""

    unit: str
    count: int
    minimum: float
    p50: float
    p99: float
    p99_9: float
    maximum: float
    rounds: tuple[float, ...]


def unit_of(cell: str) -> str:
    """The unit that a cell's name ends with; the longest ending wins. Raises ValueError for none."""
    for ending in sorted(_UNITS, key=len, reverse=True):
        if cell.endswith(ending):
            return _UNITS[ending]
    raise ValueError(f"cell {cell!r} names no unit: end it with one of {', '.join(_UNITS)}")


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank: the smallest sample that at least `percent` % of all samples do not exceed."""
    if not ordered:
        raise ValueError("no samples")
    rank = math.ceil(round(percent * len(ordered) / 100, 9))  # 99.9 % of 1,000 is 999, not 999.0000000000001
    return ordered[max(rank, 1) - 1]


def summarise(cell: str, rounds: Sequence[Sequence[float]]) -> Summary:
    """rounds: the samples of each round, in order; rounds without samples are left out."""
    measured = [samples for samples in rounds if samples]
    ordered = sorted(sample for samples in measured for sample in samples)
    return Summary(
        unit=unit_of(cell),
        count=len(ordered),
        minimum=ordered[0],
        p50=percentile(ordered, 50),
        p99=percentile(ordered, 99),
        p99_9=percentile(ordered, 99.9),
        maximum=ordered[-1],
        rounds=tuple(statistics.median_low(samples) for samples in measured),
    )
