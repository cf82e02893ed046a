"""A real Slurm cluster of virtual nodes on this machine, for the time of a benchmark (`tools/slurm`)."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness.running import ROOT
from tests.live.waiting import free_ports

UP_S = 120.0


@contextmanager
def cluster(directory: Path, nodes: int, cores: int) -> Iterator[dict[str, str]]:
    """What Slurm's commands need in their environment; `cores` of each node."""
    up = ["tools/slurm/up.sh", str(directory), str(nodes), str(free_ports(nodes + 1)), str(cores)]
    try:
        subprocess.run(up, cwd=ROOT, check=True, timeout=UP_S, stdout=subprocess.DEVNULL)
        yield {"SLURM_CONF": str(directory / "slurm.conf")}
    finally:
        subprocess.run(["tools/slurm/down.sh", str(directory)], cwd=ROOT, check=False, timeout=60)
