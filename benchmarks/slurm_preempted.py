"""Claim: 1,000 calls in flight while batch takes all nodes: none is lost, none is charged for it.

Elastic leases on all cores of a cluster of virtual nodes, in a partition whose jobs Slurm may preempt. A
client keeps so many calls unanswered; once some have run on each node, a job of higher priority takes all
nodes for a while. The calls' function may not be retried (`Retry(max=0)`, the default): a call that an
eviction were charged for would fail. Each run of a call leaves a mark, so what ran again is known. How long
the batch job waits for its nodes is compared with the same nodes full of ordinary jobs that do nothing.

    python -m benchmarks.slurm_preempted [--quick] [--json FILE]
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import isthmus
from benchmarks.harness import machine
from benchmarks.harness.clusters import cluster
from isthmus.core.errors import IsthmusError
from tests.live.sites import RunningSite, running_site

CALLS = 1000
CALLS_QUICK = 200
CALL_S = 0.1
NODES, CORES = 6, 2
BATCH_S = 4  # for so long it holds the nodes
LIMIT_S = 180.0


@isthmus.function(resources=isthmus.Resources(cores=1, memory="256MiB"))
def marked(number: int, path: str, duration_s: float) -> int:
    """Leaves a mark when it begins: its number and the node."""
    with open(path, "a") as file:
        file.write(f"{number} {os.environ['SLURMD_NODENAME']}\n")
    time.sleep(duration_s)
    return number * number


def marks(path: Path) -> list[tuple[int, str]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(number), node) for number, node in map(str.split, lines)]


def take_all_nodes() -> float:
    """Submit the batch job and wait until it runs: how long that took, in s."""
    start_s = time.monotonic()
    shape = ("--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null")
    job = _run("sbatch", "--parsable", *shape, "--wrap", f"sleep {BATCH_S}").strip()
    _until(lambda: _run("squeue", "--noheader", "--format=%T", f"--jobs={job}").strip() == "RUNNING")
    return time.monotonic() - start_s


def bare_wait_s() -> float:
    """The same where ordinary jobs hold all cores."""
    shape = ("--partition=scavenge", "--cpus-per-task=1", "--mem=256M", "--output=/dev/null")
    _run("sbatch", f"--array=1-{NODES * CORES}", *shape, "--wrap", "exec sleep 300")
    _until(lambda: _run("squeue", "--noheader", "--states=R", "--format=%A").count("\n") == NODES * CORES)
    waited_s = take_all_nodes()
    _until(lambda: not _run("squeue", "--noheader").strip())
    return waited_s


def measure(site: RunningSite, path: Path, calls: int) -> dict[str, Any]:
    with isthmus.connect(site.url, api_key=site.key) as client:
        start_s = time.monotonic()
        futures: list[isthmus.Future[int]] = []

        def top_up() -> bool:
            open_calls = sum(not future.done() for future in futures)
            numbers = range(len(futures), len(futures) + calls - open_calls)
            futures.extend([client.submit(marked, number, str(path), CALL_S) for number in numbers])
            return len({node for _, node in marks(path)}) == NODES

        _until(top_up)
        in_flight = sum(not future.done() for future in futures)
        waited_s = take_all_nodes()
        concurrent.futures.wait(futures, timeout=LIMIT_S)
        answers = [_answer(future) for future in futures]
        ran = [number for number, _ in marks(path)]
        right = sum(answer == number * number for number, answer in enumerate(answers))
        failed = [repr(answer) for answer in answers if isinstance(answer, BaseException)]
        return {
            "calls": len(futures), "in_flight": in_flight, "right": right, "lost": len(futures) - right,
            "charged": len(failed), "failures": sorted(set(failed))[:3],
            "ran_again": len(ran) - len(set(ran)), "batch_waited_s": waited_s,
            "evicted_leases": evicted(site), "taken_s": time.monotonic() - start_s,
        }  # fmt: skip


def _until(condition: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"not within {LIMIT_S:.0f} s; see squeue")
        time.sleep(0.05)


def _answer(future: "isthmus.Future[int]") -> object:
    if not future.done():
        return None
    try:
        return future.result(timeout_s=0)
    except IsthmusError as error:
        return error


def evicted(site: RunningSite) -> int:
    with site.client() as client:
        leases = client.get("/v1/leases?ended=1").json()
    return sum(lease["end_reason"] == "evicted" for lease in leases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{CALLS_QUICK} calls")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    load_start = machine.load_average()
    with tempfile.TemporaryDirectory(prefix="preempted-", dir="/tmp") as folder:
        directory = Path(folder)
        directory.chmod(0o755)
        with cluster(directory / "slurm", NODES, CORES) as environ:
            os.environ.update(environ)
            bare_s = bare_wait_s()
            settings = {"ISTHMUS_SLURM__ELASTIC_PARTITION": "scavenge", "ISTHMUS_SLURM__TICK_S": "1"}
            state = directory / "site"
            with running_site(state, "--platform", "slurm", **environ, **settings) as site:
                result = measure(site, directory / "marks", CALLS_QUICK if options.quick else CALLS)
    document = {
        "benchmark": "slurm_preempted", "machine": dataclasses.asdict(machine.describe()),
        "load_average": [load_start, machine.load_average()], "nodes": NODES, "cores": CORES,
        "summary": result | {"batch_waited_bare_s": bare_s},
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))
    sys.exit(0 if result["lost"] == 0 else 1)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


if __name__ == "__main__":
    main()
