"""What a measured thing is: a process of its own that measures the cells it is asked for and prints one JSON.

Standard library only: peers import this inside their own environments. Invariant: stdout carries the JSON and
nothing else, whatever the peer's own processes print. Not here: starting subjects and their time limits
(`running`), summaries (`samples`).
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

PAYLOAD_BYTES = 1 << 20
WORKER_CORE = 1
_USABLE_CORES = os.sched_getaffinity(0)  # before anything is pinned


class Budget(NamedTuple):
    """How long one cell may take: it ends at `samples` or `seconds`, whichever comes first."""

    samples: int
    seconds: float
    warmup: int
    throughput_calls: int
    throughput_repeats: int


FULL = Budget(samples=5_000, seconds=2.0, warmup=200, throughput_calls=2_000, throughput_repeats=3)
QUICK = Budget(samples=200, seconds=0.3, warmup=20, throughput_calls=500, throughput_repeats=1)


@dataclass
class Cells:
    """Samples of one subject by cell name, which ends with the unit: `noop_us`, `throughput_per_s`."""

    budget: Budget
    wanted: frozenset[str]
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def wants(self, *names: str) -> bool:
        """Whether any of these cells is asked for. What is asked for are endings: `noop_us` asks for
        `task_noop_us`.
        """
        return not self.wanted or any(name.endswith(tuple(self.wanted)) for name in names)

    def latency(self, name: str, call: Callable[..., object], *arguments: object) -> None:
        """Time single calls, one after the other, if this cell is wanted."""
        if self.wants(name):
            self.samples[name] = latencies_us(self.budget, call, *arguments)

    def latency_asleep(
        self, name: str, asleep_s: float, call: Callable[..., object], *arguments: object
    ) -> None:
        """Time single calls, each after a sleep of `asleep_s`."""
        if self.wants(name):
            self.samples[name] = latencies_asleep_us(self.budget, asleep_s, call, *arguments)

    def throughput(self, name: str, run: Callable[[int], object], times: int = 1) -> None:
        """Time `run(calls)`, which returns when all of its calls are answered; one sample per repeat."""
        if not self.wants(name):
            return
        calls = self.budget.throughput_calls * times
        run(max(1, calls // 10))
        rates = []
        for _ in range(self.budget.throughput_repeats):
            start_ns = time.perf_counter_ns()
            run(calls)
            rates.append(calls / (time.perf_counter_ns() - start_ns) * 1e9)
        self.samples[name] = rates

    def value(self, name: str, value: float) -> None:
        if self.wants(name):
            self.samples.setdefault(name, []).append(value)


def latencies_us(budget: Budget, call: Callable[..., object], *arguments: object) -> list[float]:
    """Microseconds of each call of `call(*arguments)`, after a warm-up. The clock's own cost is included."""
    clock_ns = time.perf_counter_ns
    give_up_ns = clock_ns() + int(budget.seconds * 1e9)
    for _ in range(budget.warmup):
        call(*arguments)
        if clock_ns() > give_up_ns:
            break
    elapsed_ns = []
    append = elapsed_ns.append
    gc.collect()
    limit_ns = clock_ns() + int(budget.seconds * 1e9)
    for _ in range(budget.samples):
        start_ns = clock_ns()
        call(*arguments)
        end_ns = clock_ns()
        append(end_ns - start_ns)
        if end_ns > limit_ns:
            break
    return [nanoseconds / 1000 for nanoseconds in elapsed_ns]


def latencies_asleep_us(
    budget: Budget, asleep_s: float, call: Callable[..., object], *arguments: object
) -> list[float]:
    """Microseconds of each call, with a sleep of `asleep_s` before it."""
    clock_ns, sleep = time.perf_counter_ns, time.sleep
    elapsed_ns = []
    for _ in range(min(budget.samples, int(budget.seconds / asleep_s))):
        sleep(asleep_s)
        start_ns = clock_ns()
        call(*arguments)
        elapsed_ns.append(clock_ns() - start_ns)
    return [nanoseconds / 1000 for nanoseconds in elapsed_ns]


def pin(process_id: int, core: int) -> bool:
    """Bind the main thread of a process to one core. False: not allowed, or no such core here."""
    try:
        os.sched_setaffinity(process_id, {core})
    except OSError:
        return False
    return True


def pin_pair(worker_ids: set[int]) -> str:
    """Bind this thread and the workers to the two cores that every subject uses; gives a note on what was
    done.

    A worker that its own system has already bound (a leased core) keeps its core, and the caller takes
    another.
    """
    if len(_USABLE_CORES) < 2:
        return "not pinned: one core"
    bound = {core for worker in worker_ids for core in _single_core(worker)}
    worker_core = min(bound, default=WORKER_CORE)
    caller_core = next(core for core in sorted(_USABLE_CORES) if core != worker_core)
    pinned = all(pin(worker, worker_core) for worker in worker_ids) and pin(0, caller_core)
    return (
        f"caller on core {caller_core}, worker on core {worker_core}" if pinned else "not pinned: not allowed"
    )


def _single_core(process_id: int) -> set[int]:
    with suppress(OSError):
        cores = os.sched_getaffinity(process_id)
        if len(cores) == 1:
            return cores
    return set()


def run(name: str, measure: Callable[[Cells], None]) -> None:
    """The main of every subject: parse what is asked, measure it, print JSON on the real stdout."""
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--quick", action="store_true", help="a few samples: does it work?")
    parser.add_argument(
        "--cells", default="", help="comma-separated endings of cells to measure; all without it"
    )
    options = parser.parse_args()
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cells = Cells(QUICK if options.quick else FULL, frozenset(filter(None, options.cells.split(","))))
    measure(cells)
    json.dump(
        {"subject": name, "samples": cells.samples, "notes": cells.notes,
         "versions": {"python": sys.version.split()[0]} | cells.versions},
        answer,
    )  # fmt: skip
    answer.close()
