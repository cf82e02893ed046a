"""A decision in words: what was asked, which rules fired, which nodes were weighed, what came out and why."""

from isthmus.core import kinds
from isthmus.core.units import format_bytes
from isthmus.policy.decide import Decision
from isthmus.policy.fairness import Standing
from isthmus.policy.snapshot import Demand

_BEFORE_NODES = ("class", "pool", "quota", "guarantee")


def in_words(demand: Demand, decision: Decision) -> tuple[str, ...]:
    """Lines for a person, most important first."""
    return (
        _headline(demand, decision),
        *_rules(decision),
        *_nodes(decision),
        *_consequences(decision),
        *_turn(decision),
    )


def _headline(demand: Demand, decision: Decision) -> str:
    lease = demand.lease
    gpus = [_count(lease.resources.gpus, "GPU")] if lease.resources.gpus else []
    together = " together" if lease.together else ""
    sizes = [_count(lease.resources.cores, "core"), format_bytes(lease.resources.memory_bytes), *gpus]
    each = ", ".join(sizes + kinds.in_words(lease.resources.amounts))
    leases = f"{_count(lease.count, f'{lease.lease_class} lease')}{together}"
    asked = f"{demand.tenant} asked for {leases} of {each} from pool {lease.pool!r}"
    match decision.outcome:
        case "grant":
            return f"{asked}: granted on {', '.join(dict.fromkeys(decision.places))}." + _because(decision)
        case "wait":
            return f"{asked}: has to wait." + _because(decision)
        case "deny":
            return f"{asked}: denied." + _because(decision)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _because(decision: Decision) -> str:
    return f" Why: {decision.reason}." if decision.reason else ""


def _rules(decision: Decision) -> list[str]:
    if not decision.fired:
        return ["No rule matched the request; what fits is allowed."]
    return [f"Rule {fired.rule!r} ({fired.action}): {fired.effect}." for fired in decision.fired]


def _nodes(decision: Decision) -> list[str]:
    if not decision.candidates and (decision.blocked_by in _BEFORE_NODES or decision.outcome == "deny"):
        return []  # it was settled before any node was looked at
    lines = [f"{decision.nodes_fitting} of {_count(decision.nodes_total, 'node')} had room."]
    chosen = set(decision.places)
    for candidate in decision.candidates:
        verdict = f"refused by rule {candidate.denied_by!r}" if candidate.denied_by else "not needed"
        if candidate.node in chosen:
            verdict = "chosen"
        lines.append(
            f"  {candidate.node}: score {candidate.score:.3f}, room for {candidate.slots}: {verdict}"
        )
    return lines


def _consequences(decision: Decision) -> list[str]:
    return [f"Asked to leave for it: {', '.join(decision.evict)}."] if decision.evict else []


def _turn(decision: Decision) -> list[str]:
    """Fair share, in numbers: where the tenant stands, and who else waits."""
    if not decision.standings:
        return []
    own, *others = decision.standings
    priority = f", priority {decision.priority:+d}" if decision.priority else ""
    lines = [f"Fair share: {_level(own)}{priority}; the lowest level is served first."]
    for other in others:
        turn = "before" if other.level < own.level else "after"
        lines.append(f"  {turn} it waits {_level(other)}.")
    return lines


def _level(standing: Standing) -> str:
    used = f" and used {standing.used:.2%} on average lately" if standing.used else ""
    weight = f", weight {standing.weight:g}" if standing.weight != 1 else ""
    dominant = kinds.noun(standing.dominant) if kinds.is_site_wide(standing.dominant) else standing.dominant
    return (
        f"{standing.tenant} holds {standing.held:.2%} of the site's {dominant}{used}{weight}: "
        f"level {standing.level:.4f}"
    )
