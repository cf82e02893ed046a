"""What tenants are guaranteed, what of it others may borrow, and whose leases go back to them.

A tenant may always have its guarantee. What it does not use of it, others may borrow: as elastic leases,
which are pushed out when it asks again, unless it lends nothing (`lend = false`). Reserved leases are never
pushed out, so they do not borrow.

Invariant: pure. A tenant is never pushed below its own guarantee. Not here: choosing the leases
(`preemption.py`).
"""

import functools
from typing import NamedTuple

import msgspec

from isthmus.core import kinds
from isthmus.core.ids import TenantId
from isthmus.core.model import LeaseClass, Resources
from isthmus.core.units import format_bytes
from isthmus.policy.rules import PolicySet
from isthmus.policy.snapshot import Demand, Holding, Snapshot
from isthmus.policy.terms import Guarantee


class Loan(NamedTuple):
    """How many leases beyond one's own guarantee may be had of what is free, and why not more.

    left   what is free beyond what is kept for others; below 0 where they are guaranteed more
    """

    leases: int
    reason: str
    left: Holding

    def short(self, resources: Resources, least: int) -> dict[str, int]:
        """What is lacking of site-wide kinds to borrow `least` leases; nothing where more than that is."""
        wanted = {kind: need * least for kind, need in resources.amounts.items() if kinds.is_site_wide(kind)}
        supplied = msgspec.structs.replace(self.left, amounts=self.left.amounts | wanted)
        if _fitting(supplied, resources) < least:
            return {}
        lacking = {kind: need - self.left.amounts.get(kind, 0) for kind, need in wanted.items()}
        return {kind: amount for kind, amount in lacking.items() if amount > 0}


def within(policies: PolicySet, snapshot: Snapshot, demand: Demand) -> int:
    """How many more leases fit into what the tenant is guaranteed: 0 without a guarantee."""
    terms = policies.guaranteed.get(demand.tenant)
    if terms is None:
        return 0
    unused = _unused(terms.guarantee, snapshot.tenants.get(demand.tenant, Holding()))
    resources = demand.lease.resources
    named = terms.guarantee.amounts
    if (resources.gpus and not terms.guarantee.gpus) or any(kind not in named for kind in resources.amounts):
        return 0
    return _fitting(unused, resources, terms.guarantee)


def loan(policies: PolicySet, snapshot: Snapshot, demand: Demand, lease_class: LeaseClass) -> Loan | None:
    """What may be borrowed of what is free now; None when nobody's guarantee stands in the way."""
    kept: list[tuple[TenantId, Holding]] = []
    for tenant, terms in policies.guaranteed.items():
        may_borrow = terms.lend and lease_class is not LeaseClass.RESERVED
        if tenant != demand.tenant and not may_borrow:
            unused = _unused(terms.guarantee, snapshot.tenants.get(tenant, Holding()))
            if unused != Holding():
                kept.append((tenant, unused))
    if not kept:
        return None
    free = _free(snapshot)
    left = Holding(
        cores=free.cores - sum(unused.cores for _, unused in kept),
        memory_bytes=free.memory_bytes - sum(unused.memory_bytes for _, unused in kept),
        gpus=free.gpus - sum(unused.gpus for _, unused in kept),
        amounts=functools.reduce(_less, (unused.amounts for _, unused in kept), free.amounts),
    )
    whose = ", ".join(f"{tenant} ({_in_words(unused)})" for tenant, unused in kept)
    hint = "; elastic leases may borrow it" if lease_class is LeaseClass.RESERVED else ""
    return Loan(_fitting(left, demand.lease.resources), f"what is free is guaranteed to {whose}{hint}", left)


def keeps(own: Guarantee, held: Holding, lost: Holding) -> bool:
    """Whether a tenant that loses this still has what it is guaranteed."""
    return (
        (not own.cores or held.cores - lost.cores >= own.cores)
        and (not own.memory_bytes or held.memory_bytes - lost.memory_bytes >= own.memory_bytes)
        and (not own.gpus or held.gpus - lost.gpus >= own.gpus)
        and all(
            held.amounts.get(kind, 0) - lost.amounts.get(kind, 0) >= amount
            for kind, amount in own.amounts.items()
        )
    )


def _unused(guarantee: Guarantee, held: Holding) -> Holding:
    return Holding(
        cores=max(guarantee.cores - held.cores, 0),
        memory_bytes=max(guarantee.memory_bytes - held.memory_bytes, 0),
        gpus=max(guarantee.gpus - held.gpus, 0),
        amounts={
            kind: amount - held.amounts.get(kind, 0)
            for kind, amount in guarantee.amounts.items()
            if amount > held.amounts.get(kind, 0)
        },
    )


def _fitting(room: Holding, resources: Resources, named: Guarantee | None = None) -> int:
    """Leases of `resources` that fit; with `named`, only what it names limits them."""
    counts = []
    if named is None or named.cores:
        counts.append(room.cores // resources.cores)
    if named is None or named.memory_bytes:
        counts.append(room.memory_bytes // resources.memory_bytes)
    if resources.gpus:
        counts.append(room.gpus // resources.gpus)
    counts += [room.amounts.get(kind, 0) // need for kind, need in resources.amounts.items()]
    return max(min(counts), 0) if counts else 0


def _free(snapshot: Snapshot) -> Holding:
    """Of the site and its open nodes, without those that batch jobs lend: only harvested leases may have
    them.
    """
    nodes = snapshot.nodes
    own = nodes.open & ~nodes.lent
    amounts = {kind: int(column[own].sum()) for kind, column in nodes.free_of.items()}
    for kind, stock in snapshot.stocks.items():
        amounts[kind] = stock.total - stock.others - snapshot.held(kind)
    return Holding(
        cores=int(nodes.free_cores[own].sum()),
        memory_bytes=int(nodes.free_memory_bytes[own].sum()),
        gpus=int(nodes.free_gpus[own].sum()),
        amounts=amounts,
    )


def _less(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return kinds.sums(one, other, -1)


def _in_words(unused: Holding) -> str:
    words = [f"{unused.cores} cores"] * bool(unused.cores)
    words += [format_bytes(unused.memory_bytes)] * bool(unused.memory_bytes)
    words += [f"{unused.gpus} GPUs"] * bool(unused.gpus)
    return ", ".join(words + kinds.in_words(unused.amounts))
