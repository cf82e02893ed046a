"""Claim: what a site asks of slurmctld grows neither with the leases it holds nor with its clients.

A site on a cluster of virtual nodes at the default `tick_s`: idle; with a few leases; with many; with many
and clients that each ask the site for leases, nodes and status, up to ten times a second. In each state
slurmctld's own count of requests (sdiag) is read over a window in which no lease begins or ends.

    python -m benchmarks.slurm_load [--quick] [--json FILE]
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.clusters import cluster
from tests.live.sites import RunningSite, running_site

NODES, CORES = 8, 8
LEASES, LEASES_QUICK = 48, 6
CLIENTS, CLIENTS_QUICK = 50, 4
WINDOW_S, WINDOW_QUICK_S = 30.0, 8.0
SETTLE_S = 5.0
PAUSE_S = 0.1
GROWTH_MAX = 1.25
PATHS = ("/v1/leases", "/v1/nodes", "/v1/status")
_BY_TYPE = re.compile(r"^\t(\w+)\s+\( *\d+\) count:(\d+)", re.MULTILINE)
_OURS = re.compile(r"JOB|NODE|PARTITION|STEP|SUBMIT|ALLOC|KILL|STATS|LICENSE|BATCH")


def requests() -> dict[str, int]:
    """What users' commands have asked slurmctld, by type; slurmd's messages are not ours."""
    printed = subprocess.run(("sdiag",), capture_output=True, text=True, check=True, timeout=60).stdout
    counts = {name: int(count) for name, count in _BY_TYPE.findall(printed)}
    return {
        name: count for name, count in counts.items() if name.startswith("REQUEST_") and _OURS.search(name)
    }


def per_minute(window_s: float, answers: list[int]) -> tuple[dict[str, float], int]:
    """Requests by type, and what clients were answered, in the same window."""
    time.sleep(SETTLE_S)
    before, answered, start_s = requests(), sum(answers), time.monotonic()
    time.sleep(window_s)
    after, answered, took_s = requests(), sum(answers) - answered, time.monotonic() - start_s
    grown = {name: count - before.get(name, 0) for name, count in after.items()}
    grown["REQUEST_STATS_INFO"] = grown.get("REQUEST_STATS_INFO", 1) - 1  # the second sdiag counts the first
    return {name: 60 * count / took_s for name, count in grown.items() if count > 0}, answered


@contextmanager
def asking(site: RunningSite, clients: int) -> Iterator[list[int]]:
    """So many clients ask the site all the time; gives how often each was answered."""
    stop, answers = threading.Event(), [0] * clients

    def ask(number: int) -> None:
        with site.client() as client:
            while not stop.wait(PAUSE_S):
                client.get(PATHS[answers[number] % len(PATHS)]).raise_for_status()
                answers[number] += 1

    with ThreadPoolExecutor(max(clients, 1)) as pool:
        asked = [pool.submit(ask, number) for number in range(clients)]
        try:
            yield answers
        finally:
            stop.set()
        for one in asked:
            one.result()


def hold(site: RunningSite, count: int, stack: ExitStack) -> None:
    """That many leases, renewed until the stack ends."""
    client = stack.enter_context(site.client())
    shape = {"resources": {"cores": 1, "memory": "64MiB"}, "lease_class": "reserved", "wait_s": 60}
    held: list[str] = []
    for _ in range(count):
        reply = client.post("/v1/leases", json=shape)
        reply.raise_for_status()
        held += [grant["lease"] for grant in reply.json()["grants"]]
    stop = threading.Event()

    def renew() -> None:
        with site.client() as renewing:
            while not stop.wait(5.0):
                renewing.post("/v1/leases/renew", json={"leases": held}).raise_for_status()

    pool = stack.enter_context(ThreadPoolExecutor(1))
    renewing = pool.submit(renew)
    stack.callback(renewing.result)
    stack.callback(stop.set)


def held(site: RunningSite) -> int:
    with site.client() as client:
        return sum(lease["state"] == "active" for lease in client.get("/v1/leases").json())


def measure(site: RunningSite, leases: int, clients: int, window_s: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        for wanted, asked_by in ((0, 0), (max(leases // 8, 1), 0), (leases, 0), (leases, clients)):
            hold(site, wanted - held(site), stack)
            with asking(site, asked_by) as answers:
                by_type, answered = per_minute(window_s, answers)
            if held(site) != wanted:
                raise RuntimeError(f"{held(site)} leases are left of {wanted}; this says nothing of them")
            rows.append({
                "leases": wanted, "clients": asked_by, "answers_to_clients": answered,
                "requests_per_minute": sum(by_type.values()), "by_type": by_type,
            })  # fmt: skip
    return rows


def grows(rows: list[dict[str, Any]]) -> bool:
    """By more than a tick's requests at either end of a window."""
    return rows[-1]["requests_per_minute"] > GROWTH_MAX * rows[0]["requests_per_minute"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help=f"{LEASES_QUICK} leases, {CLIENTS_QUICK} clients"
    )
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    load_start = machine.load_average()
    sizes = (LEASES_QUICK, CLIENTS_QUICK, WINDOW_QUICK_S) if options.quick else (LEASES, CLIENTS, WINDOW_S)
    with tempfile.TemporaryDirectory(prefix="load-", dir="/tmp") as folder:
        directory = Path(folder)
        directory.chmod(0o755)
        with cluster(directory / "slurm", NODES, CORES) as environ:
            os.environ.update(environ)
            with running_site(directory / "site", "--platform", "slurm", **environ) as site:
                rows = measure(site, *sizes)
    document = {
        "benchmark": "slurm_load", "machine": dataclasses.asdict(machine.describe()),
        "load_average": [load_start, machine.load_average()], "nodes": NODES, "cores": CORES, "summary": rows,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))
    sys.exit(1 if grows(rows) else 0)


if __name__ == "__main__":
    main()
