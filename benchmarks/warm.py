"""Claim: a call of a sleeping executor takes at most 80 µs, and twice a Unix-socket ping-pong that slept as
long.
"""

from benchmarks.harness.floors import ASLEEP_S
from benchmarks.harness.sites import site_for
from benchmarks.harness.subject import Cells, run
from benchmarks.peers.workload import noop


def measure(cells: Cells) -> None:
    """ASLEEP_S is several times node.spin_s, so that each call finds the executor asleep."""
    with site_for(cells) as site:
        cells.latency_asleep("call_us", ASLEEP_S, site.call, noop, b"x")


if __name__ == "__main__":
    run("warm", measure)
