"""Decide one request: `decide(policies, snapshot, demand) -> Decision`, with its reasons.

Order of judgement: rules, class, pool, quota and caps, what is guaranteed to others, size, capacity, and
where a rule, a guarantee or idleness allows it, preemption.

Invariant: pure. The same arguments give the same decision, so the decision log can be replayed (`replay.py`).
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from isthmus.core.ids import LeaseId, NodeId
from isthmus.core.kinds import in_words
from isthmus.core.model import LeaseClass, Record, Resources
from isthmus.policy import fairness, guarantees, limits, placement
from isthmus.policy.fairness import STANDINGS_MAX, Standing
from isthmus.policy.limits import Room
from isthmus.policy.preemption import Wanted, victims
from isthmus.policy.rules import Allow, Cap, Deny, Hurry, PolicySet, Prefer, Reclass, Rule
from isthmus.policy.snapshot import Demand, Snapshot
from isthmus.policy.weighing import CANDIDATES_MAX, Candidate, Weighing

Block = Literal["", "rule", "class", "pool", "quota", "guarantee", "size", "capacity"]
Pushed = Literal["elastic", "borrowing", "idle"]


class Fired(Record, frozen=True):
    """A rule that matched, and what that led to, in words."""

    rule: str
    action: str
    effect: str


class Decision(Record, frozen=True):
    """
    places        one node per lease granted; fewer than asked when not `together`
    blocked_by    what stood in the way of granting all
    evict         elastic leases to drain, so that this request can be served once they are gone
    nodes_fitting of nodes_total had room for at least one lease
    priority      who has more is served before who has less; among equals the standings decide
    standings     where the tenant stands by fair share, then others that wait, the next to be served first
    """

    outcome: Literal["grant", "wait", "deny"]
    lease_class: LeaseClass
    places: tuple[NodeId, ...] = ()
    blocked_by: Block = ""
    reason: str = ""
    fired: tuple[Fired, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    evict: tuple[LeaseId, ...] = ()
    nodes_total: int = 0
    nodes_fitting: int = 0
    priority: int = 0
    standings: tuple[Standing, ...] = ()


def decide(policies: PolicySet, snapshot: Snapshot, demand: Demand) -> Decision:
    """Grant, wait or deny. Raises nothing: a request that makes no sense was refused before it came here."""
    return _Judgement(policies, snapshot, demand).decision()


def priority(policies: PolicySet, snapshot: Snapshot, demand: Demand) -> int:
    """How urgent a request is, before anything else about it is decided: see `Decision.priority`."""
    return _Judgement(policies, snapshot, demand).priority


class _Judgement:
    """One decision in the making: what fired so far, and the context in which conditions are evaluated."""

    def __init__(self, policies: PolicySet, snapshot: Snapshot, demand: Demand) -> None:
        self.policies = policies
        self.snapshot = snapshot
        self.demand = demand
        self.standing = fairness.standing(policies, snapshot, demand.tenant)
        self.priority = policies.terms_of(demand.tenant).priority
        self.resources: Resources = demand.lease.resources
        self.lease_class = demand.lease.lease_class
        self.weighing = Weighing(policies, snapshot, demand, self.standing.level)
        self.fired: list[Fired] = []
        self.caps: list[Cap] = []
        self.may_preempt = False
        self.own = 0  # leases that are still within what the tenant is guaranteed
        self._evaluate_request_rules(policies)

    def decision(self) -> Decision:
        if self.weighing.refusal is not None and not self.weighing.verdicts:
            return self._no("deny", "rule", _refused(self.weighing.refusal))
        if self.demand.lease.pool not in self.snapshot.pools:
            known = ", ".join(sorted(self.snapshot.pools))
            return self._no("deny", "pool", f"no pool named {self.demand.lease.pool!r}; there are {known}")
        room = limits.room(self.snapshot, self.demand, self.caps)
        if room.never:
            return self._no("deny", room.block, room.reason)
        wanted = self.demand.lease.count
        least = wanted if self.demand.lease.together else 1
        room = self._lent(room, least)
        if room.leases < least:
            return self._short(room, least)
        return self._place(min(wanted, room.leases), least, room)

    def _short(self, room: Room, least: int) -> Decision:
        """Wait; where the site has too little of something, leases that hold it may have to go, and others
        from the nodes that the request needs as well.
        """
        whose, evict = self._whose(least), tuple[LeaseId, ...]()
        if room.short:
            usable = self._usable(self.weighing.weigh(self._fitting(), least).candidates)
            evict = self._evict(whose, _missing(usable, least), room.short)
        asked = f"; {len(evict)} {whose} leases are asked to leave" if evict else ""
        return self._no("wait", room.block, room.reason + asked, evict=evict)

    def _lent(self, room: Room, least: int) -> Room:
        """The room that others' guarantees leave; lent nodes back none."""
        if not self.policies.guaranteed or self.lease_class is LeaseClass.HARVESTED:
            return room
        self.own = guarantees.within(self.policies, self.snapshot, self.demand)
        loan = guarantees.loan(self.policies, self.snapshot, self.demand, self.lease_class)
        if loan is None:
            return room
        if room.short and self.own < least:
            room = room._replace(short=loan.short(self.resources, least))
        if max(self.own, loan.leases) >= room.leases:
            return room
        return Room(max(self.own, loan.leases), False, "guarantee", loan.reason)

    # rules --------------------------------------------------------------------------------------------------
    def _evaluate_request_rules(self, policies: PolicySet) -> None:
        settled = False
        reclassed = False
        for rule in policies.on_requests:
            spec = rule.spec
            is_verdict = isinstance(spec, (Allow, Deny))
            if (is_verdict and settled) or (reclassed and isinstance(spec, Reclass)):
                continue
            if rule.reads_node:
                (self.weighing.verdicts if is_verdict else self.weighing.preferences).append(rule)
            elif rule.matches(self.weighing.context):
                self._apply(rule)
                settled |= is_verdict
                reclassed |= isinstance(spec, Reclass)

    def _apply(self, rule: Rule) -> None:
        spec = rule.spec
        match spec:
            case Allow():
                self.may_preempt = spec.preempt
                effect = "allowed" + (", and may push elastic leases out" if spec.preempt else "")
            case Deny():
                self.weighing.refusal = spec
                everywhere = " on every node that no rule allows" if self.weighing.verdicts else ""
                effect = "refused" + everywhere
            case Prefer():
                self.weighing.bonus += spec.weight
                effect = f"every node gets {spec.weight:+g}"
            case Cap():
                self.caps.append(spec)
                effect = f"capped per {spec.per}"
            case Hurry():
                self.priority += spec.by
                effect = f"priority {spec.by:+d}"
            case Reclass():
                effect = f"class {self.lease_class} became {spec.lease_class}"
                self.lease_class = spec.lease_class
        self.fired.append(Fired(rule=rule.name, action=rule.action, effect=effect))

    # nodes --------------------------------------------------------------------------------------------------
    def _place(self, wanted: int, least: int, room: Room) -> Decision:
        weighed = self.weighing.weigh(self._fitting(), wanted)
        usable = self._usable(weighed.candidates)
        places = placement.lay_out([c.node for c in usable], [c.slots for c in usable], wanted)
        kept = weighed.candidates[:CANDIDATES_MAX]
        if len(places) >= least:
            return self._yes(tuple(places), room, kept, weighed.fitting)
        block, reason = self._why_not(kept, weighed.fitting)
        outcome: Literal["wait", "deny"] = "deny" if block in ("size", "rule") else "wait"
        whose = self._whose(least)
        evict = self._evict(whose, _missing(usable, least), {}) if block == "capacity" else ()
        if evict:
            reason += f"; {len(evict)} {whose} leases are asked to leave"
        return self._no(outcome, block, reason, kept, weighed.fitting, evict)

    def _fitting(self) -> placement.BoolArray:
        nodes = self.snapshot.nodes
        hosts = placement.hosts(nodes, self.lease_class, self.resources)
        return placement.fits(nodes, self.resources) & hosts

    def _usable(self, candidates: tuple[Candidate, ...]) -> list[Candidate]:
        return [candidate for candidate in candidates if not candidate.denied_by]

    # outcomes -----------------------------------------------------------------------------------------------
    def _why_not(self, candidates: tuple[Candidate, ...], fitting: int) -> tuple[Block, str]:
        each = (
            f"{self.resources.cores} cores",
            str(self.resources.memory),
            *in_words(self.resources.amounts),
        )
        asked = f"{self.demand.lease.count} x {', '.join(each)}"
        least = self.demand.lease.count if self.demand.lease.together else 1
        nodes = self.snapshot.nodes
        hosts = placement.hosts(nodes, self.lease_class, self.resources)
        is_harvest = self.lease_class is LeaseClass.HARVESTED  # what is lent changes with every job
        too_large = "" if is_harvest else limits.too_large(nodes, self.resources, least, hosts)
        if too_large:
            return "size", too_large
        if fitting and candidates and all(candidate.denied_by for candidate in candidates):
            return (
                "rule",
                f"no node may take it: rule {candidates[0].denied_by!r} refuses {candidates[0].node}",
            )
        if fitting:
            return "capacity", f"{fitting} nodes have room, but not for all of {asked}"
        usable = nodes.open & hosts
        if not bool(np.any(usable)):
            closed = "no node takes leases now: each is drained, or its agent is not connected"
            return "capacity", "no batch job lends its idle cores now" if is_harvest else closed
        free = int(nodes.free_cores[usable].max())
        return "capacity", f"no node has room for {asked} now (most free cores on one node: {free})"

    def _whose(self, least: int) -> Pushed:
        """Whose leases it may push out: elastic ones if a rule says so, of those who borrow what it is
        guaranteed, or any that nobody calls.
        """
        if self.lease_class is LeaseClass.RESERVED and self.may_preempt:
            return "elastic"
        return "borrowing" if least <= self.own else "idle"

    def _evict(self, whose: Pushed, missing: int, short: Mapping[str, int]) -> tuple[LeaseId, ...]:
        if self.lease_class is LeaseClass.HARVESTED:
            return ()
        hosts = placement.hosts(self.snapshot.nodes, self.lease_class, self.resources)
        wanted = Wanted(
            resources=self.resources,
            missing=missing,
            short=short,
            spared=self.demand.tenant if whose == "borrowing" else None,
            only_idle=whose == "idle",
            may_use=lambda row: bool(hosts[row]) and self.weighing.may_use(row),
        )
        return victims(self.policies, self.snapshot, wanted)

    def _standings(self) -> tuple[Standing, ...]:
        others = [tenant for tenant in self.snapshot.waiting if tenant != self.demand.tenant]
        ranked = fairness.standings(self.policies, self.snapshot, others)
        return (self.standing, *ranked[:STANDINGS_MAX])

    def _yes(
        self, places: tuple[NodeId, ...], room: Room, candidates: tuple[Candidate, ...], fitting: int
    ) -> Decision:
        wanted = self.demand.lease.count
        short = len(places) < wanted
        why = (room.reason if room.leases < wanted else "no more room now") if short else ""
        return Decision(
            outcome="grant",
            lease_class=self.lease_class,
            places=places,
            blocked_by=(room.block if room.leases < wanted else "capacity") if short else "",
            reason=f"{len(places)} of {wanted} granted: {why}" if short else "",
            fired=tuple(self.fired),
            candidates=candidates,
            nodes_total=len(self.snapshot.nodes.ids),
            nodes_fitting=fitting,
            priority=self.priority,
            standings=self._standings(),
        )

    def _no(
        self,
        outcome: Literal["wait", "deny"],
        block: Block,
        reason: str,
        candidates: tuple[Candidate, ...] = (),
        fitting: int = 0,
        evict: tuple[LeaseId, ...] = (),
    ) -> Decision:
        return Decision(
            outcome=outcome,
            lease_class=self.lease_class,
            blocked_by=block,
            reason=reason,
            fired=tuple(self.fired),
            candidates=candidates,
            evict=evict,
            nodes_total=len(self.snapshot.nodes.ids),
            nodes_fitting=fitting,
            priority=self.priority,
            standings=self._standings(),
        )


def _missing(usable: list[Candidate], least: int) -> int:
    """Leases for which no node has room."""
    return max(least - sum(candidate.slots for candidate in usable), 0)


def _refused(rule: Deny) -> str:
    return f"rule {rule.name!r}: {rule.message}" if rule.message else f"rule {rule.name!r} refuses it"
