"""What conditions may read, built from a snapshot and a demand: `request`, `tenant`, `node`, `pool`, `clock`,
`signal`.

Invariant: names and types here are those that `conditions.FIELDS` lists; only the fields that some rule reads
are built, because the CEL library copies each of them.
"""

from collections.abc import Iterable
from typing import Any

from isthmus.core.kinds import OF_NODES, is_site_wide, license_of
from isthmus.policy.conditions import OPEN_VARIABLES, STATIC_NODE_FIELDS
from isthmus.policy.snapshot import Demand, Holding, NodeTable, Pool, Shape, Snapshot

_COLUMNS = {"memory": "memory_bytes", "free_memory": "free_memory_bytes"}  # what rules call them: what we do

_FREE = {f"free_{kind}": kind for kind in OF_NODES}


def of_node(nodes: NodeTable, row: int, fields: Iterable[str]) -> dict[str, Any]:
    """`node` for one row of the table."""
    shape = nodes.shapes[nodes.shape[row]]
    shown: dict[str, Any] = {}
    for field in fields:
        if field in STATIC_NODE_FIELDS:
            shown[field] = _of_shape(shape, field)
        elif field == "name":
            shown[field] = nodes.ids[row]
        elif field in _FREE:
            column = nodes.free_of.get(_FREE[field])
            shown[field] = 0 if column is None else int(column[row])
        else:
            shown[field] = int(getattr(nodes, _COLUMNS.get(field, field))[row])
    return shown


def of_shape(shape: Shape, fields: Iterable[str]) -> dict[str, Any]:
    """`node` for all nodes of one shape, as far as they are alike."""
    return {field: _of_shape(shape, field) for field in fields}


def _of_shape(shape: Shape, field: str) -> Any:
    if field in OF_NODES:
        return dict(shape.amounts).get(field, 0)
    return dict(shape.labels) if field == "labels" else getattr(shape, _COLUMNS.get(field, field))


def of_request(
    snapshot: Snapshot, demand: Demand, level: float, reads: dict[str, frozenset[str]]
) -> dict[str, Any]:
    """What conditions do read of what they may: a variable costs time in proportion to its fields.

    level   where the tenant stands (`fairness.py`)
    """
    everything = _everything(snapshot, demand, level) if reads else {}
    shown: dict[str, Any] = {
        root: {field: everything[root][field] for field in fields}
        for root, fields in reads.items()
        if root != "node" and root not in OPEN_VARIABLES
    }
    if "signal" in reads:
        shown["signal"] = dict(snapshot.signals)
    return shown


def _everything(snapshot: Snapshot, demand: Demand, level: float) -> dict[str, dict[str, Any]]:
    lease = demand.lease
    holding = snapshot.tenants.get(demand.tenant, Holding())
    pool = snapshot.pools.get(lease.pool, Pool())
    asked = lease.resources.amounts
    return {
        "request": {
            "cores": lease.resources.cores,
            "memory": lease.resources.memory_bytes,
            "gpus": lease.resources.gpus,
            **{kind: asked.get(kind, 0) for kind in OF_NODES},
            "licenses": lease.resources.licenses,
            "class": lease.lease_class.value,
            "pool": lease.pool,
            "count": lease.count,
            "together": lease.together,
            "policy": lease.policy,
            "function": lease.function,
            "labels": lease.labels,
            "wait_s": lease.wait_s,
        },
        "tenant": {
            "name": demand.tenant,
            "role": demand.role,
            "cores": holding.cores,
            "memory": holding.memory_bytes,
            "gpus": holding.gpus,
            **{kind: holding.amounts.get(kind, 0) for kind in OF_NODES},
            "licenses": {
                license_of(kind): count for kind, count in holding.amounts.items() if is_site_wide(kind)
            },
            "leases": holding.leases,
            "level": level,
        },
        "pool": {"name": lease.pool, "leases": pool.leases, "minimum": pool.minimum, "maximum": pool.maximum},
        "clock": of_clock(snapshot.clock_s),
    }


def of_clock(clock_s: float) -> dict[str, Any]:
    """`clock`, in UTC; weekday 0 is Monday (1970-01-01 was a Thursday)."""
    minutes = int(clock_s // 60)
    return {
        "epoch_s": clock_s,
        "hour": minutes // 60 % 24,
        "minute": minutes % 60,
        "weekday": (minutes // 1440 + 3) % 7,
    }
