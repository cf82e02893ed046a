"""Count what functions did under one lease, from reports that may restart from zero with each executor."""

from collections.abc import Iterable

from isthmus.core.api import FunctionSummary
from isthmus.node.messages import FunctionUse


class FunctionCounts:
    """Totals by function name. A report lists counters of the executors that live now: when one of them is
    gone, the sums fall, and what they had reached is kept as a base for the next."""

    def __init__(self) -> None:
        self._base: dict[str, FunctionSummary] = {}
        self._latest: dict[str, FunctionSummary] = {}

    def report(self, uses: Iterable[FunctionUse]) -> None:
        sums = sum_by_name(_summary(use) for use in uses)
        for name, before in self._latest.items():
            now = sums.get(name)
            if now is None or now.calls < before.calls:
                self._base[name] = _add(self._base[name], before) if name in self._base else before
        self._latest = sums

    def summaries(self) -> list[FunctionSummary]:
        return list(sum_by_name([*self._base.values(), *self._latest.values()]).values())


def sum_by_name(rows: Iterable[FunctionSummary]) -> dict[str, FunctionSummary]:
    sums: dict[str, FunctionSummary] = {}
    for row in rows:
        sums[row.name] = _add(sums[row.name], row) if row.name in sums else row
    return sums


def _add(one: FunctionSummary, other: FunctionSummary) -> FunctionSummary:
    return FunctionSummary(
        name=one.name,
        calls=one.calls + other.calls,
        errors=one.errors + other.errors,
        busy_s=one.busy_s + other.busy_s,
        last_s=max(one.last_s, other.last_s),
    )


def _summary(use: FunctionUse) -> FunctionSummary:
    return FunctionSummary(
        name=use.name, calls=use.calls, errors=use.errors, busy_s=use.busy_s, last_s=use.last_s
    )
