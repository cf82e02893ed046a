"""How many more leases a tenant may have: quota, caps from rules, the pool's maximum, and what the site has
of what is counted over all nodes.

Invariant: pure arithmetic on holdings. Not here: whether a node has room (`placement.py`).
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from isthmus.core import kinds
from isthmus.core.kinds import Stock
from isthmus.core.model import Quota, Resources
from isthmus.policy.placement import BoolArray
from isthmus.policy.rules import Cap
from isthmus.policy.snapshot import Demand, Holding, NodeTable, Pool, Snapshot


class Room(NamedTuple):
    """`leases` more may be had now; `never`: not even if the tenant (or everybody) gave everything back.

    short   how much is lacking of which site-wide kinds, where nothing but that is in the way
    """

    leases: int
    never: bool
    block: Literal["quota", "pool", "guarantee", "size", "capacity"]
    reason: str
    short: Mapping[str, int] = {}


class _Limit(NamedTuple):
    whose: str
    noun: str
    limit: int
    held: int
    need: int  # per lease
    kind: str = ""  # of the further ones


def room(snapshot: Snapshot, demand: Demand, caps: list[Cap]) -> Room:
    """The tightest of all limits, with its reason; what can never be had before all that waiting helps."""
    least = demand.lease.count if demand.lease.together else 1
    rooms = list(_rooms(snapshot, demand, caps, least))
    tightest = min(rooms, key=lambda room: (not room.never, room.leases))
    tight = [room for room in rooms if room.leases < least]
    if not all(room.short for room in tight):
        return tightest._replace(short={})
    return tightest._replace(short={kind: lacking for room in tight for kind, lacking in room.short.items()})


def _rooms(snapshot: Snapshot, demand: Demand, caps: list[Cap], least: int) -> Iterator[Room]:
    """What each limit leaves."""
    pool = snapshot.pools[demand.lease.pool]
    yield Room(pool.maximum - pool.leases, False, "pool", _pool_reason(demand.lease.pool, pool))
    for limit in _limits(snapshot, demand, caps):
        if limit.need:
            fitting = max(limit.limit - limit.held, 0) // limit.need
            yield Room(fitting, limit.limit // limit.need < least, "quota", _reason(limit))
    for reason in _spent(snapshot, demand, caps):
        yield Room(0, False, "quota", reason)
    for kind, need in demand.lease.resources.amounts.items():
        if kinds.is_site_wide(kind):
            yield _stocked(snapshot, kind, need, least)


def too_large(nodes: NodeTable, resources: Resources, least: int, hosts: BoolArray) -> str:
    """Why `least` such leases could never be held at once, even with all nodes empty; nothing if they could
    (or no node is known yet).

    hosts  (nodes,): those that may take them at all
    """
    if not hosts.any():
        return ""
    bound = kinds.of_node(resources.amounts)
    checks = (
        ("cores", resources.cores, nodes.cores * hosts),
        ("bytes of memory", resources.memory_bytes, nodes.memory_bytes * hosts),
        ("GPUs", resources.gpus, nodes.gpus * hosts),
    )
    for noun, need, column in checks:
        if need > int(column.max()):
            largest = int(column.argmax())
            return f"no node has {need} {noun} (most: {int(column[largest])} on {nodes.ids[largest]})"
    for kind, amount in bound.items():
        column = nodes.all_of.get(kind, np.zeros(len(hosts), dtype=np.int64)) * hosts
        if amount > (most := int(column.max())):
            best = f"most: {kinds.number(kind, most)} on {nodes.ids[int(column.argmax())]}"
            there = best if most else f"none has any to lease: set node.{kind}"
            return f"no node has {kinds.number(kind, amount)} {kinds.noun(kind)} ({there})"
    slots = np.minimum(nodes.cores // resources.cores, nodes.memory_bytes // resources.memory_bytes)
    if resources.gpus:
        slots = np.minimum(slots, nodes.gpus // resources.gpus)
    for kind, amount in bound.items():
        slots = np.minimum(slots, nodes.all_of[kind] // amount)
    slots = slots * hosts
    if not slots.any():
        return f"no single node has all of {resources}"
    most = int(slots.sum())
    return "" if most >= least else f"{least} leases at once: all nodes together hold {most} such"


def _limits(snapshot: Snapshot, demand: Demand, caps: list[Cap]) -> Iterator[_Limit]:
    held = snapshot.tenants.get(demand.tenant, Holding())
    quota = demand.quota
    yield from _each(f"tenant {demand.tenant}", held, demand.lease.resources, quota)
    for cap in caps:
        whose = f"rule {cap.name!r}, per {cap.per}"
        yield from _each(whose, _held(snapshot, demand, cap), demand.lease.resources, cap)


def _each(whose: str, held: Holding, need: Resources, most: Quota | Cap) -> Iterator[_Limit]:
    if most.cores:
        yield _Limit(whose, "cores", most.cores, held.cores, need.cores)
    if most.memory_bytes:
        yield _Limit(whose, "bytes of memory", most.memory_bytes, held.memory_bytes, need.memory_bytes)
    if most.gpus:
        yield _Limit(whose, "GPUs", most.gpus, held.gpus, need.gpus)
    if most.leases:
        yield _Limit(whose, "leases", most.leases, held.leases, 1)
    wanted = need.amounts
    for kind, limit in most.amounts.items():
        yield _Limit(
            whose, kinds.noun(kind), limit, held.amounts.get(kind, 0), wanted.get(kind, 0), kind=kind
        )


def _stocked(snapshot: Snapshot, kind: str, need: int, least: int) -> Room:
    """How many leases the site's stock of a kind is enough for."""
    noun = kinds.noun(kind)
    stock = snapshot.stocks.get(kind, Stock(total=0))
    if need * least > stock.total and snapshot.nodes.ids:  # without any node nothing is known yet
        there_are = ", ".join(kinds.in_words({kind: one.total for kind, one in snapshot.stocks.items()}))
        reason = f"the site has {stock.total or 'no'} {noun}, and {need * least} are asked for"
        return Room(0, True, "size", reason if stock.total else f"{reason}; it has {there_are or 'none'}")
    held = snapshot.held(kind)
    free = max(stock.total - held - stock.others, 0)
    others = f" ({stock.others} of them outside this site)" if stock.others else ""
    reason = f"{held + stock.others} of {stock.total} {noun} are held{others}; each lease needs {need}"
    lacking = need * least - free
    return Room(free // need, False, "capacity", reason, {kind: lacking} if lacking > 0 else {})


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
        amounts=functools.reduce(kinds.sums, (held.amounts for held in holdings), {}),
    )


def _reason(limit: _Limit) -> str:
    most, held, need = (
        kinds.number(limit.kind, count) if limit.kind else str(count)
        for count in (limit.limit, limit.held, limit.need)
    )
    return f"{limit.whose} may hold {most} {limit.noun} and holds {held}; each lease needs {need} more"


def _pool_reason(name: str, pool: Pool) -> str:
    return f"pool {name!r} holds {pool.leases} of at most {pool.maximum} leases"
