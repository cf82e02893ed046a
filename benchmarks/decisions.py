"""Time of one policy decision over 10,000 nodes and 50 rules. Prints JSON; the promise is a median of at most
1 ms.

Floor: the 50 conditions evaluated once each, which no decision can undercut.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable

import cel

from isthmus.core.api import LeaseRequest
from isthmus.core.ids import NodeId, RequestId, TenantId
from isthmus.core.model import Resources
from isthmus.policy import Demand, PolicySet, Snapshot, decide, load_policies
from isthmus.policy.snapshot import Holding, NodeRow, NodeTable, Pool

NODES = 10_000
REQUEST_RULES, SHAPE_RULES, NODE_RULES = 32, 12, 6
ZONES = 8
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    samples = parser.parse_args().samples
    chance = random.Random(SEED)
    policies, snapshot = _policies(), _snapshot(chance)
    demands = [_demand(chance, i) for i in range(64)]
    taken = _measure(lambda i: decide(policies, snapshot, demands[i % len(demands)]), samples)
    programs = [
        cel.compile(f'name == "t{i}" && gpus > 0') for i in range(REQUEST_RULES + SHAPE_RULES + NODE_RULES)
    ]
    context = cel.Context(variables={"name": "t", "gpus": 0})
    floor = _measure(lambda _: [program.execute(context) for program in programs], samples)
    print(json.dumps(_result(taken, floor), indent=2))


def _measure(act: Callable[[int], object], samples: int) -> list[float]:
    """Seconds of each call, sorted; a tenth of the samples warms up first."""
    for i in range(samples // 10 + 1):
        act(i)
    taken = []
    for i in range(samples):
        started = time.perf_counter()
        act(i)
        taken.append(time.perf_counter() - started)
    return sorted(taken)


def _result(taken: list[float], floor: list[float]) -> dict[str, object]:
    return {
        "name": "policy decision",
        "nodes": NODES,
        "rules": REQUEST_RULES + SHAPE_RULES + NODE_RULES,
        "samples": len(taken),
        "decision_ms_p50": round(statistics.median(taken) * 1e3, 4),
        "decision_ms_p99": round(taken[int(len(taken) * 0.99)] * 1e3, 4),
        "decision_ms_p999": round(taken[int(len(taken) * 0.999)] * 1e3, 4),
        "decisions_per_s": round(len(taken) / sum(taken)),
        "floor_ms_p50": round(statistics.median(floor) * 1e3, 4),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": sys.version.split()[0],
    }


def _policies() -> PolicySet:
    """Two thirds of the rules look at the request, the rest at labels, free cores and names of nodes."""
    rules = [
        _rule(
            f"request {i}", f'tenant.name == "tenant{i}" && request.gpus > {i % 4} && clock.hour < 6', "deny"
        )
        for i in range(REQUEST_RULES)
    ]
    rules += [
        _rule(f"zone {i}", f'node.labels.zone == "z{i % ZONES}" && request.cores > {i // ZONES}', "prefer")
        for i in range(SHAPE_RULES)
    ]
    rules += [
        _rule(f"node {i}", f'node.free_cores < 2 && node.name == "n{i}"', "deny") for i in range(NODE_RULES)
    ]
    return load_policies("\n".join(rules))


def _rule(name: str, when: str, then: str) -> str:
    return f"[[rule]]\nname = '{name}'\nwhen = '{when}'\nthen = '{then}'\n"


def _snapshot(chance: random.Random) -> Snapshot:
    rows = [
        NodeRow(
            node=NodeId(f"n{i}"),
            platform="slurm",
            cores=64,
            memory_bytes=256 * 2**30,
            gpus=4 * (i % 10 == 0),
            free_cores=chance.randint(0, 64),
            free_memory_bytes=chance.randint(0, 256) * 2**30,
            free_gpus=chance.randint(0, 4) * (i % 10 == 0),
            labels={"zone": f"z{i % ZONES}"},
        )
        for i in range(NODES)
    ]
    tenants = {TenantId("tenant"): Holding(cores=100, leases=50)}
    return Snapshot(
        nodes=NodeTable(rows), tenants=tenants, pools={"default": Pool(maximum=10**6)}, clock_s=1.7e9
    )


def _demand(chance: random.Random, number: int) -> Demand:
    resources = Resources(cores=chance.choice((1, 2, 8)), memory="4GiB", gpus=chance.choice((0, 0, 0, 1)))
    request = LeaseRequest(resources=resources, count=chance.choice((1, 1, 1, 4, 16)))
    return Demand(request=RequestId(f"rq_{number}"), tenant=TenantId("tenant"), lease=request)


if __name__ == "__main__":
    main()
