"""From asking Slurm for one core to the first result there: isthmus, bare salloc + srun, and other systems.

On one cluster of virtual nodes, in turn, so that a machine that drifts drifts for all alike. What each system
keeps running between allocations (our site, Dask's scheduler, Parsl's interchange) runs before its clock
starts; what starts in the allocation (agent, worker) is in the time. Each sample is a new job; only `pool` is
a second site's lease on an allocation that stands ready.

    python -m benchmarks.slurm_peers [--quick] [--json FILE]

Not here: ours alone, with more samples (`slurm_lease.py`).
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import environments, machine
from benchmarks.harness.clusters import cluster
from benchmarks.harness.running import ROOT
from benchmarks.slurm_lease import POOL, bare_ms, lease_ms, wait_until_ready
from tests.live.sites import RunningSite, running_site

ROUNDS = 5
ROUNDS_QUICK = 2
NODES, CORES = 6, 4
PEER_S = 90.0
PEERS = {"parsl": "parsl", "dask_jobqueue": "dask", "hyperqueue": "hyperqueue"}
"""Requirements file -> `peers/slurm_NAME.py`, which prints milliseconds."""


class PeerFailedError(RuntimeError):
    """A peer gave no result; says what it said last."""


def peer_ms(python: Path, name: str) -> float:
    done = subprocess.run(
        [python, "-m", f"benchmarks.peers.slurm_{name}"],
        cwd=ROOT, capture_output=True, text=True, timeout=PEER_S,
    )  # fmt: skip
    if done.returncode:
        raise PeerFailedError(done.stderr.strip()[-500:])
    return float(done.stdout.split()[-1])


def ways(
    site: RunningSite, ready: RunningSite, failures: dict[str, str]
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What takes turns, by name."""
    yield "bare", bare_ms
    yield "isthmus", lambda: lease_ms(site.url, site.key)
    yield "pool", lambda: lease_ms(ready.url, ready.key)
    for requirements, name in PEERS.items():
        try:
            python = environments.python_of(requirements, _say)
        except environments.EnvironmentFailedError as error:
            failures[name] = str(error)
        else:
            yield name, lambda python=python, name=name: peer_ms(python, name)  # type: ignore[misc]


def measure(
    site: RunningSite, ready: RunningSite, rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    samples: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    chosen = list(ways(site, ready, failures))
    for _ in range(rounds):
        for name, once in chosen:
            try:
                samples.setdefault(name, []).append(once())
            except (PeerFailedError, subprocess.SubprocessError) as error:
                failures[name] = str(error)
                _say(f"{name} failed: {error}")
        _say("  ".join(f"{name} {taken[-1]:.0f} ms" for name, taken in samples.items() if taken))
    return samples, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rounds: does it work?")
    parser.add_argument("--json", type=Path, help="where all samples go")
    options = parser.parse_args()
    load_start = machine.load_average()
    with tempfile.TemporaryDirectory(prefix="peers-", dir="/tmp") as folder:
        directory = Path(folder)
        directory.chmod(0o755)
        with cluster(directory / "slurm", NODES, CORES) as environ:
            os.environ.update(environ)
            with (
                running_site(directory / "site", "--platform", "slurm", **environ) as site,
                running_site(directory / "ready", "--platform", "slurm", **environ, **POOL) as ready,
            ):
                wait_until_ready(ready)
                samples, failures = measure(site, ready, ROUNDS_QUICK if options.quick else ROUNDS)
    document = {
        "benchmark": "slurm_peers", "machine": dataclasses.asdict(machine.describe()),
        "load_average": [load_start, machine.load_average()], "nodes": NODES,
        "summary": {
            name: {"count": len(taken), "p50": statistics.median(taken), "worst": max(taken)}
            for name, taken in samples.items() if taken
        },
        "failures": failures, "samples_ms": samples,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
