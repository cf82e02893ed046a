"""Claim: a NumPy array of 1 MiB travels at 60 % or more of memcpy bandwidth, in each direction.

A sample is a whole call. The function sees the array in place; what it returns arrives as an array again.
"""

from benchmarks.harness.sites import site_for
from benchmarks.harness.subject import Cells, run
from benchmarks.peers.workload import ARRAY, check_echo, echo, give, take


def measure(cells: Cells) -> None:
    with site_for(cells) as site:
        check_echo(site.call(echo, ARRAY))
        cells.latency("in_us", site.call, take, ARRAY)
        cells.latency("out_us", site.call, give)
        cells.latency("echo_us", site.call, echo, ARRAY)


if __name__ == "__main__":
    run("payload", measure)
