"""DESIGN's promises as data, and their verdicts.

Invariant: pure functions of `promises.toml` and the summaries of one run. A promise without its measurement
is `unmeasured`, one for a later part of isthmus is `later`: neither is hidden, neither counts as met.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.harness.samples import Summary

PROMISES = Path(__file__).parents[1] / "promises.toml"
Outcome = Literal["met", "missed", "unmeasured", "later"]


@dataclass(frozen=True)
class Promise:
    """The p50 of `measure`, less that of `minus`, divided by that of `over`, must respect the bound."""

    id: str
    text: str
    unit: str
    measure: str = ""
    minus: str = ""
    over: str = ""
    at_most: float | None = None
    at_least: float | None = None
    later: str = ""  # why `python -m benchmarks` does not measure it

    def __post_init__(self) -> None:
        if not self.later and (not self.measure or (self.at_most is None) == (self.at_least is None)):
            raise ValueError(f"promise {self.id!r} needs `measure` and one of `at_most`, `at_least`")

    @property
    def bound(self) -> str:
        if self.at_most is None and self.at_least is None:
            return ""
        sign, value = ("≤", self.at_most) if self.at_most is not None else ("≥", self.at_least)
        return f"{sign} {value:g} {self.unit}"


@dataclass(frozen=True)
class Verdict:
    promise: Promise
    outcome: Outcome
    value: float | None = None

    @property
    def shortfall(self) -> str:
        """By how much a missed promise is missed, as a factor of its bound."""
        promise, value = self.promise, self.value
        if self.outcome != "missed" or value is None:
            return ""
        if promise.at_most is not None:
            return f"{value / promise.at_most:.2f}× the bound"
        return f"{value / (promise.at_least or 1):.2f} of the bound"


def load(path: Path = PROMISES) -> tuple[Promise, ...]:
    rows = tomllib.loads(path.read_text("utf-8"))["promise"]
    promises = tuple(Promise(**row) for row in rows)
    names = [promise.id for promise in promises]
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: two promises have the same id")
    return promises


def judge(promise: Promise, cells: Mapping[str, Summary]) -> Verdict:
    if promise.later:
        return Verdict(promise, "later")
    value = _value(promise, cells)
    return Verdict(promise, "unmeasured") if value is None else judge_value(promise, value)


def judge_value(promise: Promise, value: float) -> Verdict:
    """Of what was measured elsewhere: `later` does not count."""
    kept = (promise.at_most is None or value <= promise.at_most) and (
        promise.at_least is None or value >= promise.at_least
    )
    return Verdict(promise, "met" if kept else "missed", value)


def _value(promise: Promise, cells: Mapping[str, Summary]) -> float | None:
    needed = [name for name in (promise.measure, promise.minus, promise.over) if name]
    if any(name not in cells for name in needed):
        return None
    value = cells[promise.measure].p50
    if promise.minus:
        value -= cells[promise.minus].p50
    if promise.over:
        value /= cells[promise.over].p50
    return value
