"""Promise: on Slurm, asking for a lease to its first result takes at most 100 ms more than salloc + srun.

Not kept by a lease that needs a job of its own: the agent's interpreter, its imports and its first zygote
start in it. Kept by one on an allocation that stands ready (`slurm.pools`): only its client is new.

All in one run, taking turns, on the cluster that SLURM_CONF names (`tools/slurm/up.sh DIR`, `. DIR/env`). The
bare pair allocates the same and starts `true`. Two sites: one without a pool, one with one allocation.
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
from tests.live.sites import RunningSite, running_site

SAMPLES = 20
SAMPLES_QUICK = 3
READY_S = 60.0
POOL = {
    "ISTHMUS_SLURM__POOLS__READY__CORES": "2",
    "ISTHMUS_SLURM__POOLS__READY__MEMORY": "2GiB",
    "ISTHMUS_SLURM__POOLS__READY__MINIMUM": "1",
}


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


def wait_until_ready(site: RunningSite) -> None:
    """Its pool's allocation takes leases."""
    give_up_s = time.monotonic() + READY_S
    with site.client() as client:
        while not client.get("/v1/status").json()["pools"][0]["cores_free"]:
            assert time.monotonic() < give_up_s, client.get("/v1/status").json()["pools"]
            time.sleep(0.1)


def main() -> None:
    samples = SAMPLES_QUICK if "--quick" in sys.argv else SAMPLES
    taken: dict[str, list[float]] = {"bare_ms": [], "lease_ms": [], "ready_ms": []}
    with (
        tempfile.TemporaryDirectory() as state,
        running_site(Path(state) / "cold", "--platform", "slurm") as cold,
        running_site(Path(state) / "warm", "--platform", "slurm", **POOL) as warm,
    ):
        wait_until_ready(warm)
        for _ in range(samples):
            taken["bare_ms"].append(bare_ms())
            taken["lease_ms"].append(lease_ms(cold.url, cold.key))
            taken["ready_ms"].append(lease_ms(warm.url, warm.key))
    medians = {f"{name}_p50": statistics.median(values) for name, values in taken.items()}
    print(json.dumps({"benchmark": "slurm_lease", "samples": samples, **medians, **taken}))


def _run(*command: str) -> str:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=30)
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
