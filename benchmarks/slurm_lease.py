"""Promise: on Slurm, asking for a lease to its first result takes at most 100 ms more than salloc + srun.

Not kept yet: the agent's interpreter, its imports and its first zygote start within each allocation.

Both in one run, taking turns, on the cluster that SLURM_CONF names (`tools/slurm/up.sh DIR`, `. DIR/env`).
Each lease is a new job, a new agent and a new client; the bare pair allocates the same and starts `true`.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import isthmus
from benchmarks.peers.workload import noop
from isthmus.platforms.slurm.commands import environment
from tests.live.sites import running_site

SAMPLES = 20
SAMPLES_QUICK = 3


def bare_ms() -> float:
    """salloc --no-shell and one srun in it."""
    start_s = time.perf_counter()
    shape = ("--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=1024M")
    said = _run("salloc", "--no-shell", "--job-name=bare", "--time=5", *shape)
    job = said.split()[-1]
    _run("srun", f"--jobid={job}", "--overlap", "true")
    taken_ms = (time.perf_counter() - start_s) * 1e3
    _run("scancel", job)
    return taken_ms


def lease_ms(url: str, key: str) -> float:
    """A lease of one core to the first result, seen by a new client."""
    with isthmus.connect(url, api_key=key) as site:
        start_s = time.perf_counter()
        site.call(noop, b"x")
        return (time.perf_counter() - start_s) * 1e3


def main() -> None:
    samples = SAMPLES_QUICK if "--quick" in sys.argv else SAMPLES
    bare: list[float] = []
    leases: list[float] = []
    with tempfile.TemporaryDirectory() as state, running_site(Path(state), "--platform", "slurm") as site:
        for _ in range(samples):
            bare.append(bare_ms())
            leases.append(lease_ms(site.url, site.key))
    medians = {"bare_ms_p50": statistics.median(bare), "lease_ms_p50": statistics.median(leases)}
    print(
        json.dumps(
            {"benchmark": "slurm_lease", "samples": samples, **medians, "bare_ms": bare, "lease_ms": leases}
        )
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=30)
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
