"""Claim: a policy decision over 10,000 nodes and 50 rules takes at most 1 ms.

Floor: the 50 conditions evaluated once each, which no decision can undercut.
"""

import itertools
import random

import cel

from benchmarks.harness.subject import Cells, run
from isthmus.core.api import LeaseRequest
from isthmus.core.ids import NodeId, RequestId, TenantId
from isthmus.core.model import Resources
from isthmus.policy import Demand, PolicySet, Snapshot, decide, load_policies
from isthmus.policy.snapshot import Holding, NodeRow, NodeTable, Pool

NODES = 10_000
REQUEST_RULES, SHAPE_RULES, NODE_RULES = 32, 12, 6
ZONES = 8
SEED = 1


def measure(cells: Cells) -> None:
    chance = random.Random(SEED)
    policies, snapshot = _policies(), _snapshot(chance)
    demands = itertools.cycle([_demand(chance, number) for number in range(64)])
    cells.latency("decide_us", lambda: decide(policies, snapshot, next(demands)))
    rules = range(REQUEST_RULES + SHAPE_RULES + NODE_RULES)
    programs = [cel.compile(f'name == "t{number}" && gpus > 0') for number in rules]
    context = cel.Context(variables={"name": "t", "gpus": 0})
    cells.latency("floor_us", lambda: [program.execute(context) for program in programs])


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
    run("decisions", measure)
