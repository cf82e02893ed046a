"""Claim: 1 MiB put into leased memory, and got from it. A sample is one operation of a block."""

import isthmus
from benchmarks.harness.subject import Cells, pin_pair, run
from benchmarks.peers.workload import ARRAY

MIB = 1 << 20


def measure(cells: Cells) -> None:
    cells.versions["isthmus"] = isthmus.__version__
    with isthmus.connect() as site, site.memory("64MiB") as memory:
        (lease,) = site.leases()
        cells.notes.append(pin_pair({info.pid for info in lease.executors}))
        block = memory.allocate(MIB)
        block.put(ARRAY)
        if bytes(block.get()) != ARRAY.tobytes():
            raise RuntimeError("what was got is not what was put")
        cells.latency("put_us", block.put, ARRAY)
        cells.latency("get_us", block.get, 0, MIB)


if __name__ == "__main__":
    run("memory", measure)
