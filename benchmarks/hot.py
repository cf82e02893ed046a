"""Claim: a hot call of a Python function on the same node takes at most 3 µs, 1 byte there and 1 byte back.

Hot: the executor spins on the fabric, and so does the caller.
"""

from benchmarks.harness.sites import site_for
from benchmarks.harness.subject import Cells, run
from benchmarks.peers.workload import noop


def measure(cells: Cells) -> None:
    with site_for(cells) as site:
        cells.latency("call_us", site.call, noop, b"x")
        cells.latency("submit_us", lambda: site.submit(noop, b"x").result())


if __name__ == "__main__":
    run("hot", measure)
