"""Claim: a map over 10,000 short calls takes at most 1.1 times the ideal makespan.

The calls use 200 µs of CPU each, on every core that the site leases. The ideal is that CPU time, spread
evenly over the cores. `forked_ratio` is what bare forked processes reach that were told beforehand what to
do: the floor.
"""

import os
import time
from collections import deque

import isthmus
from benchmarks.harness.subject import Cells, run

CALLS = 10_000
CALLS_QUICK = 500
BUSY_NS = 200_000


def burn(_number: int) -> None:
    """Work, not waiting: until this thread has used BUSY_NS of CPU."""
    until_ns = time.thread_time_ns() + BUSY_NS
    while time.thread_time_ns() < until_ns:
        pass


def measure(cells: Cells) -> None:
    cells.versions["isthmus"] = isthmus.__version__
    calls = CALLS if cells.budget.throughput_calls >= 2_000 else CALLS_QUICK
    cores = len(os.sched_getaffinity(0))
    ideal_s = calls * BUSY_NS / 1e9 / cores
    with isthmus.connect() as site:
        deque(site.map(burn, range(calls // 4)), 0)  # leases are taken and warm
        for _ in range(cells.budget.throughput_repeats):
            cells.value("forked_ratio", forked_makespan_s(calls, cores) / ideal_s)
            start_s = time.perf_counter()
            deque(site.map(burn, range(calls)), 0)
            cells.value("makespan_ratio", (time.perf_counter() - start_s) / ideal_s)


def forked_makespan_s(calls: int, cores: int) -> float:
    start_s = time.perf_counter()
    children = []
    for _ in range(cores):
        child = os.fork()
        if child == 0:
            for number in range(calls // cores):
                burn(number)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return time.perf_counter() - start_s


if __name__ == "__main__":
    run("mapping", measure)
