"""Whose turn it is: dominant resource fairness over tenants, with weights, and a memory of what they used.

    level of a tenant = max over cores, memory, GPUs and whatever else is counted of
                        (what it holds now + what it held on average lately) / what the site has, / its weight

The lowest level is served first, and the highest is asked first to give something back. "On average lately"
is what it was billed, halved every `fair.half_life_h`, over the time that this remembers; so who was idle
comes before who was not, and with half_life_h = 0 only what is held now counts, which is DRF as published.

Source: Ghodsi et al., Dominant Resource Fairness, NSDI 2011, algorithm 1 and section 4.3 (weights).
Invariant: pure. Not here: the queue that is ordered by it (`isthmus.leasing.waiting`).
"""

import math
from collections.abc import Iterable, Mapping

from isthmus.core import kinds
from isthmus.core.ids import TenantId
from isthmus.core.model import Record
from isthmus.policy.rules import PolicySet
from isthmus.policy.snapshot import Holding, Snapshot, Used

Dominant = str  # cores, memory, gpus, or a further kind
STANDINGS_MAX = 8  # of other tenants, kept with a decision


class Standing(Record, frozen=True):
    """Where a tenant stands among the others.

    dominant   the resource of which it has the largest share
    held       its share of that now, 0..1;  used: on average lately, 0..1
    level      (held + used) / weight: the lowest is served first
    """

    tenant: TenantId
    dominant: Dominant
    held: float
    used: float
    weight: float
    level: float


def standing(policies: PolicySet, snapshot: Snapshot, tenant: TenantId) -> Standing:
    """Where one tenant stands now."""
    return _standing(policies, snapshot, tenant, snapshot.tenants.get(tenant, Holding()))


def level(policies: PolicySet, snapshot: Snapshot, tenant: TenantId, held: Holding) -> float:
    """How high a tenant would stand if it held this."""
    return _standing(policies, snapshot, tenant, held).level


def standings(policies: PolicySet, snapshot: Snapshot, tenants: Iterable[TenantId]) -> tuple[Standing, ...]:
    """Where they stand, the first to be served first; equal levels as given."""
    return tuple(
        sorted((standing(policies, snapshot, tenant) for tenant in tenants), key=lambda one: one.level)
    )


def spend(used: Used, more: Used, half_life_s: float) -> Used:
    """What was used before, aged until `more.at_s`, and `more` on top."""
    kept = _decay(more.at_s - used.at_s, half_life_s)
    return Used(
        core_s=used.core_s * kept + more.core_s,
        memory_byte_s=used.memory_byte_s * kept + more.memory_byte_s,
        gpu_s=used.gpu_s * kept + more.gpu_s,
        at_s=max(used.at_s, more.at_s),
        amount_s=kinds.sums(_scaled(used.amount_s, kept), more.amount_s),
    )


def _standing(policies: PolicySet, snapshot: Snapshot, tenant: TenantId, holding: Holding) -> Standing:
    held = _over_site(snapshot, holding.cores, holding.memory_bytes, holding.gpus, holding.amounts)
    used = _average(policies, snapshot, tenant)
    if held.keys() != used.keys():
        held, used = dict.fromkeys(used, 0.0) | held, dict.fromkeys(held, 0.0) | used
    weight = policies.terms_of(tenant).weight
    dominant = max(held, key=lambda resource: held[resource] + used[resource])
    return Standing(
        tenant=tenant,
        dominant=dominant,
        held=held[dominant],
        used=used[dominant],
        weight=weight,
        level=(held[dominant] + used[dominant]) / weight,
    )


def _average(policies: PolicySet, snapshot: Snapshot, tenant: TenantId) -> dict[Dominant, float]:
    """Share of the site that a tenant held on average lately: its decayed bill, over the time it weighs."""
    half_life_s = policies.fair.half_life_s
    used = snapshot.used.get(tenant)
    if used is None or half_life_s == 0:
        return {"cores": 0.0, "memory": 0.0, "gpus": 0.0}
    remembered_s = half_life_s / math.log(2)  # the integral of what is left of each second
    kept = _decay(snapshot.clock_s - used.at_s, half_life_s) / remembered_s
    return _over_site(
        snapshot,
        used.core_s * kept,
        used.memory_byte_s * kept,
        used.gpu_s * kept,
        _scaled(used.amount_s, kept),
    )


def _over_site(
    snapshot: Snapshot, cores: float, memory_bytes: float, gpus: float, amounts: Mapping[str, float]
) -> dict[Dominant, float]:
    total = snapshot.nodes.total
    shares = {
        "cores": cores / max(total.cores, 1),
        "memory": memory_bytes / max(total.memory_bytes, 1),
        "gpus": gpus / max(total.gpus, 1),
    }
    for kind, amount in amounts.items():
        there = snapshot.stocks[kind].total if kind in snapshot.stocks else total.amounts.get(kind, 0)
        if there:  # what the site has no more of is nobody's share
            shares[kind] = amount / there
    return shares


def _scaled(amounts: Mapping[str, float], factor: float) -> dict[str, float]:
    return {kind: amount * factor for kind, amount in amounts.items()} if amounts else {}


def _decay(age_s: float, half_life_s: float) -> float:
    if half_life_s == 0:
        return 0.0
    return math.exp2(-max(age_s, 0.0) / half_life_s)
