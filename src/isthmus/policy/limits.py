"""How many more leases a tenant may have: quota, caps from rules, and the pool's maximum.

Invariant: pure arithmetic on holdings. Not here: whether a node has room (`placement.py`).
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from isthmus.core.model import Resources
from isthmus.policy.placement import BoolArray
from isthmus.policy.rules import Cap
from isthmus.policy.snapshot import Demand, Holding, NodeTable, Pool, Snapshot


class Room(NamedTuple):
    """`leases` more may be had now; `never`: not even if the tenant gave everything back."""

    leases: int
    never: bool
    block: Literal["quota", "pool", "guarantee"]
    reason: str


class _Limit(NamedTuple):
    whose: str
    noun: str
    limit: int
    held: int
    need: int  # per lease


def room(snapshot: Snapshot, demand: Demand, caps: list[Cap]) -> Room:
    """The tightest of all limits, with its reason."""
    least = demand.lease.count if demand.lease.together else 1
    pool = snapshot.pools[demand.lease.pool]
    best = Room(pool.maximum - pool.leases, False, "pool", _pool_reason(demand.lease.pool, pool))
    for limit in _limits(snapshot, demand, caps):
        if limit.need == 0:
            continue
        fitting = max(limit.limit - limit.held, 0) // limit.need
        if fitting < best.leases:
            best = Room(fitting, limit.limit // limit.need < least, "quota", _reason(limit))
    for reason in _spent(snapshot, demand, caps):
        best = min(best, Room(0, False, "quota", reason), key=lambda room: room.leases)
    return best


def too_large(nodes: NodeTable, resources: Resources, least: int, hosts: BoolArray) -> str:
    """Why `least` such leases could never be held at once, even with all nodes empty; nothing if they could
    (or no node is known yet).

    hosts  (nodes,): those that may take them at all
    """
    if not hosts.any():
        return ""
    checks = (
        ("cores", resources.cores, nodes.cores * hosts),
        ("bytes of memory", resources.memory_bytes, nodes.memory_bytes * hosts),
        ("GPUs", resources.gpus, nodes.gpus * hosts),
    )
    for noun, need, column in checks:
        if need > int(column.max()):
            largest = int(column.argmax())
            return f"no node has {need} {noun} (most: {int(column[largest])} on {nodes.ids[largest]})"
    slots = np.minimum(nodes.cores // resources.cores, nodes.memory_bytes // resources.memory_bytes)
    if resources.gpus:
        slots = np.minimum(slots, nodes.gpus // resources.gpus)
    slots = slots * hosts
    if not slots.any():
        return f"no single node has all of {resources}"
    most = int(slots.sum())
    return "" if most >= least else f"{least} leases at once: all nodes together hold {most} such"


def _limits(snapshot: Snapshot, demand: Demand, caps: list[Cap]) -> Iterator[_Limit]:
    held = snapshot.tenants.get(demand.tenant, Holding())
    quota = demand.quota
    yield from _four(
        f"tenant {demand.tenant}", held, demand, quota.cores, quota.memory_bytes, quota.gpus, quota.leases
    )
    for cap in caps:
        whose = f"rule {cap.name!r}, per {cap.per}"
        held = _held(snapshot, demand, cap)
        yield from _four(whose, held, demand, cap.cores, cap.memory_bytes, cap.gpus, cap.leases)


def _four(
    whose: str, held: Holding, demand: Demand, cores: int, memory_bytes: int, gpus: int, leases: int
) -> Iterator[_Limit]:
    resources = demand.lease.resources
    if cores:
        yield _Limit(whose, "cores", cores, held.cores, resources.cores)
    if memory_bytes:
        yield _Limit(whose, "bytes of memory", memory_bytes, held.memory_bytes, resources.memory_bytes)
    if gpus:
        yield _Limit(whose, "GPUs", gpus, held.gpus, resources.gpus)
    if leases:
        yield _Limit(whose, "leases", leases, held.leases, 1)


def _spent(snapshot: Snapshot, demand: Demand, caps: list[Cap]) -> Iterator[str]:
    """Why no core-hours are left, for each limit on them that is reached."""
    quota = demand.quota
    limits = [(f"tenant {demand.tenant}", quota.core_hours, quota.window_h)]
    limits += [(f"rule {cap.name!r}, per {cap.per}", cap.core_hours, cap.window_h) for cap in caps]
    for whose, core_hours, window_h in limits:
        spent = snapshot.spent_core_h.get(window_h, 0.0)
        if core_hours and spent >= core_hours:
            yield (
                f"{whose} may use {core_hours:g} core-hours in {window_h} h and used {spent:.1f}; "
                "more when its older use is past"
            )


def _held(snapshot: Snapshot, demand: Demand, cap: Cap) -> Holding:
    if cap.per == "tenant":
        return snapshot.tenants.get(demand.tenant, Holding())
    if cap.per == "pool":
        return snapshot.pools[demand.lease.pool].held
    holdings = snapshot.tenants.values()
    return Holding(
        cores=sum(held.cores for held in holdings),
        memory_bytes=sum(held.memory_bytes for held in holdings),
        gpus=sum(held.gpus for held in holdings),
        leases=sum(held.leases for held in holdings),
    )


def _reason(limit: _Limit) -> str:
    return (
        f"{limit.whose} may hold {limit.limit} {limit.noun} and holds {limit.held}; "
        f"each lease needs {limit.need} more"
    )


def _pool_reason(name: str, pool: Pool) -> str:
    return f"pool {name!r} holds {pool.leases} of at most {pool.maximum} leases"
