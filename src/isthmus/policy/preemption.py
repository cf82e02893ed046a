"""Choose the elastic leases that make room for another request.

Whose: leases that nobody calls before those that work; of the tenant that stands highest (`fairness.py`)
first, and of one tenant the youngest first, because they lose the least work. Where: what is counted over the
whole site, wherever it is held; the rest on the node where that hurts least. Leases that are leaving anyway
are counted before any further one is asked to go, and no tenant that works is pushed below what it is
guaranteed.

Invariant: pure; what is chosen makes room for all that is missing, or nothing is chosen.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import msgspec

from isthmus.core import kinds
from isthmus.core.ids import LeaseId, NodeId, TenantId
from isthmus.core.model import Resources
from isthmus.policy import fairness, guarantees, placement
from isthmus.policy.placement import Need, Size
from isthmus.policy.rules import PolicySet
from isthmus.policy.snapshot import Holding, Preemptible, Snapshot

NODES_MAX = 64  # weighed against each other, beyond one for each lease that is missing


class Wanted(NamedTuple):
    """missing   leases of `resources` for which no node has room
    short     what is lacking of site-wide kinds
    spared    a tenant that loses nothing that works: the one that asks for what it is guaranteed
    only_idle no lease that works is asked to go
    may_use   whether the request may ever be placed on a row of the node table
    """

    resources: Resources
    missing: int
    short: Mapping[str, int]
    spared: TenantId | None
    only_idle: bool
    may_use: Callable[[int], bool]

    def may_take(self, lease: Preemptible) -> bool:
        """Whether it may be asked to go, or goes already."""
        works = not lease.leaving and not lease.idle
        return not works or not (self.only_idle or lease.tenant == self.spared)


class _Plan(NamedTuple):
    """What one more lease on a node costs: leases to push out, and leases leaving already."""

    evicted: tuple[Preemptible, ...]
    used_up: frozenset[LeaseId]


def victims(policies: PolicySet, snapshot: Snapshot, wanted: Wanted) -> tuple[LeaseId, ...]:
    """Leases to drain so that everything missing fits; empty when that cannot be reached, or needs none."""
    tenants = _Tenants(policies, snapshot)
    holders = _holders(snapshot, wanted, tenants)
    if holders is None:
        return ()
    leases = tuple(
        msgspec.structs.replace(lease, leaving=True) if lease.lease in holders else lease
        for lease in snapshot.preemptible
    )
    on_nodes = _on_nodes(snapshot, leases, wanted, tenants)
    return () if on_nodes is None else (*holders, *on_nodes)


def _on_nodes(
    snapshot: Snapshot, leases: tuple[Preemptible, ...], wanted: Wanted, tenants: "_Tenants"
) -> list[LeaseId] | None:
    """Leases to drain so that nodes have room for all that is missing; None when that cannot be reached."""
    nodes = _nodes(snapshot, leases, wanted, tenants)
    plans = {row: node.plan(tenants) for row, node in nodes.items()}
    chosen: list[LeaseId] = []
    for _ in range(wanted.missing):
        best = min(
            ((tenants.harm(plan), row, plan) for row, plan in plans.items() if plan is not None),
            key=lambda one: one[:2],
            default=None,
        )
        if best is None:
            return None
        _, row, plan = best
        for lease in plan.evicted:
            tenants.take(lease)
        nodes[row].carry_out(plan)
        chosen += [lease.lease for lease in plan.evicted]
        hurt = {lease.tenant for lease in plan.evicted}
        for other, node in nodes.items():
            if other == row or node.concerns(hurt):
                plans[other] = node.plan(tenants)
    return chosen


def _holders(snapshot: Snapshot, wanted: Wanted, tenants: "_Tenants") -> dict[LeaseId, None] | None:
    """Leases to drain so that what is short of site-wide kinds is free; None when that cannot be reached."""
    leaving = [lease for lease in snapshot.preemptible if lease.leaving]
    short = {kind: lacking - _of(kind, leaving) for kind, lacking in wanted.short.items()}
    others = [lease for lease in snapshot.preemptible if not lease.leaving and wanted.may_take(lease)]
    chosen: list[Preemptible] = []
    while short := {kind: lacking for kind, lacking in short.items() if lacking > 0}:
        others = [lease for lease in others if not short.keys().isdisjoint(lease.amounts)]
        if not others:
            return None
        lease = min(
            others, key=lambda one: (not one.idle, -tenants.level(one.tenant), -one.created_s, one.lease)
        )
        others.remove(lease)
        if lease.idle or tenants.may_lose(lease.tenant, _with(Holding(), lease)):
            tenants.take(lease)
            chosen.append(lease)
            short = {kind: lacking - lease.amounts.get(kind, 0) for kind, lacking in short.items()}
    return dict.fromkeys(lease.lease for lease in chosen)


def _of(kind: str, leases: Iterable[Preemptible]) -> int:
    return sum(lease.amounts.get(kind, 0) for lease in leases)


class _Tenants:
    """How high each tenant stands, and how much may be taken from it, as the plan unfolds."""

    def __init__(self, policies: PolicySet, snapshot: Snapshot) -> None:
        self._policies = policies
        self._snapshot = snapshot
        self._held: dict[TenantId, Holding] = {}
        self._levels: dict[TenantId, float] = {}
        for lease in snapshot.preemptible:
            if lease.leaving:  # held still, but not for long
                self.take(lease)

    def level(self, tenant: TenantId) -> float:
        if tenant not in self._levels:
            self._levels[tenant] = fairness.level(self._policies, self._snapshot, tenant, self.held(tenant))
        return self._levels[tenant]

    def held(self, tenant: TenantId) -> Holding:
        return self._held.get(tenant) or self._snapshot.tenants.get(tenant, Holding())

    def may_lose(self, tenant: TenantId, lost: Holding) -> bool:
        own = self._policies.terms.get(tenant)
        return own is None or guarantees.keeps(own.guarantee, self.held(tenant), lost)

    def take(self, lease: Preemptible) -> None:
        self._held[lease.tenant] = _with(self.held(lease.tenant), lease, -1)
        self._levels.pop(lease.tenant, None)

    def harm(self, plan: _Plan) -> tuple[float, int]:
        """What hurts less sorts first: who is pushed out stands high, and they are few."""
        levels = (self.level(lease.tenant) for lease in plan.evicted if not lease.idle)
        return -min(levels, default=float("inf")), len(plan.evicted)


class _Node:
    """A node that may be cleared: what is free on it, and whose leases could go."""

    def __init__(self, free: Size, leases: list[Preemptible], need: Need) -> None:
        self._free = free
        self._leases = leases
        self._need = need

    def concerns(self, tenants: set[TenantId]) -> bool:
        return any(lease.tenant in tenants for lease in self._leases)

    def plan(self, tenants: _Tenants) -> _Plan | None:
        """The leases to push out for one more; None when all of them are not enough."""
        free, evicted, used_up = self._free, list[Preemptible](), set[LeaseId]()
        lost: dict[TenantId, Holding] = {}
        order = sorted(
            self._leases,
            key=lambda one: (
                not one.leaving,
                not one.idle,
                -tenants.level(one.tenant),
                -one.created_s,
                one.lease,
            ),
        )
        for lease in order:
            if _fits(self._need.size, free):
                break
            taken = _with(lost.get(lease.tenant, Holding()), lease)
            if not (lease.leaving or lease.idle) and not tenants.may_lose(lease.tenant, taken):
                continue
            free = _sum(free, _size(lease, self._need.kinds))
            used_up.add(lease.lease)
            if not lease.leaving:
                lost[lease.tenant] = taken
                evicted.append(lease)
        return _Plan(tuple(evicted), frozenset(used_up)) if _fits(self._need.size, free) else None

    def carry_out(self, plan: _Plan) -> None:
        freed = [_size(lease, self._need.kinds) for lease in self._leases if lease.lease in plan.used_up]
        self._leases = [lease for lease in self._leases if lease.lease not in plan.used_up]
        for size in freed:
            self._free = _sum(self._free, size)
        self._free = _less(self._free, self._need.size, 1)


def _nodes(
    snapshot: Snapshot, preemptible: tuple[Preemptible, ...], wanted: Wanted, tenants: _Tenants
) -> dict[int, _Node]:
    """The nodes to weigh, by row: those whose leases belong to the tenants standing highest come first."""
    table = snapshot.nodes
    need = placement.need_of(wanted.resources)
    by_node: dict[NodeId, list[Preemptible]] = {}
    leases_by_level = sorted(
        preemptible, key=lambda one: (not one.leaving, not one.idle, -tenants.level(one.tenant))
    )
    for lease in leases_by_level:
        if wanted.may_take(lease):
            by_node.setdefault(lease.node, []).append(lease)
    nodes: dict[int, _Node] = {}
    for name, leases in by_node.items():
        row = table.index.get(name)
        if row is None or not table.open[row]:
            continue
        slots = max(placement.slots(table, row, need), 0)
        free = _less(placement.free(table, row, need), need.size, slots)  # the request has these already
        if _fits(need.size, _total(free, leases, need.kinds)) and wanted.may_use(row):
            nodes[row] = _Node(free, leases, need)
            if len(nodes) >= NODES_MAX + wanted.missing:
                break
    return dict(sorted(nodes.items()))


def _with(holding: Holding, lease: Preemptible, sign: int = 1) -> Holding:
    return Holding(
        cores=holding.cores + sign * lease.cores,
        memory_bytes=holding.memory_bytes + sign * lease.memory_bytes,
        gpus=holding.gpus + sign * lease.gpus,
        leases=holding.leases + sign,
        amounts=kinds.sums(holding.amounts, lease.amounts, sign),
    )


def _total(free: Size, leases: Iterable[Preemptible], kinds: tuple[str, ...]) -> Size:
    for lease in leases:
        free = _sum(free, _size(lease, kinds))
    return free


def _size(lease: Preemptible, kinds: tuple[str, ...]) -> Size:
    return lease.cores, lease.memory_bytes, lease.gpus, *(lease.amounts.get(kind, 0) for kind in kinds)


def _sum(one: Size, other: Size) -> Size:
    return tuple(map(operator.add, one, other))


def _less(one: Size, other: Size, times: int) -> Size:
    return tuple(have - times * taken for have, taken in zip(one, other, strict=True))


def _fits(need: Size, free: Size) -> bool:
    return all(map(operator.le, need, free))
