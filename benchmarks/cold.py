"""Claim: from asking for a lease to the first result takes at most 60 ms on a site that is up.

Each sample is a new client with a new lease: connect to the site, lease, fork, handshake, first call,
release. `first_s` is the whole of it, from `import isthmus` with nothing running.
"""

import time

START_S = time.perf_counter()

import isthmus  # noqa: E402
from benchmarks.harness.subject import Cells, run  # noqa: E402
from benchmarks.peers.workload import noop  # noqa: E402

LEASES = 20
LEASES_QUICK = 3


def measure(cells: Cells) -> None:
    cells.versions["isthmus"] = isthmus.__version__
    with isthmus.connect() as first:
        first.call(noop, b"x")
        cells.value("first_s", time.perf_counter() - START_S)
        for _ in range(LEASES if cells.budget.samples > LEASES else LEASES_QUICK):
            measure_lease(cells)


def measure_lease(cells: Cells) -> None:
    with isthmus.connect() as site:  # the same embedded site, another client
        start_s = time.perf_counter()
        site.call(noop, b"x")
        cells.value("lease_to_result_ms", (time.perf_counter() - start_s) * 1e3)


if __name__ == "__main__":
    run("cold", measure)
