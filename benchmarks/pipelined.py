"""Claim: one client gets 300,000 no-op calls a second out of one executor when it does not wait for each.

map      `site.map` in chunks of its own choosing: what a user writes who has many short calls
submit   one future per call
"""

from collections import deque

from benchmarks.harness.sites import site_for
from benchmarks.harness.subject import Cells, run
from benchmarks.peers.workload import noop


def measure(cells: Cells) -> None:
    with site_for(cells) as site:
        cells.throughput("map_throughput_per_s", lambda calls: deque(site.map(noop, [b"x"] * calls), 0))
        cells.throughput(
            "map_single_throughput_per_s", lambda calls: deque(site.map(noop, [b"x"] * calls, chunk=1), 0)
        )
        cells.throughput("submit_throughput_per_s", lambda calls: submit_all(site, calls))


def submit_all(site: object, calls: int) -> None:
    for future in [site.submit(noop, b"x") for _ in range(calls)]:
        future.result()


if __name__ == "__main__":
    run("pipelined", measure)
