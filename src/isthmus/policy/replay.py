"""Decide logged requests again under other policies: what would have changed, and why.

Invariant: pure. Each logged decision is judged against the snapshot that it had; a different answer earlier
in the log does not change the later snapshots (that would be a simulation, not a replay). What was used
lately is as it was logged, aged by the half-life of then.
"""

from collections.abc import Iterable

from isthmus.core.model import Record
from isthmus.policy.decide import Decision, Fired, decide
from isthmus.policy.rules import PolicySet
from isthmus.policy.snapshot import Demand, SnapshotRecord, from_record

CHANGES_MAX = 1000  # told in full; beyond them they are only counted


class Logged(Record, frozen=True):
    """One entry of the decision log."""

    demand: Demand
    snapshot: SnapshotRecord
    decision: Decision


class Change(Record, frozen=True):
    """`why`: what led to the difference, line by line, for people."""

    demand: Demand
    before: Decision
    after: Decision
    why: tuple[str, ...] = ()


class Replay(Record, frozen=True):
    """`judged` decisions, of which `differ` would have come out differently (outcome, class, places,
    evictions, priority or turn); `changes`: the newest of them.
    """

    judged: int
    changes: tuple[Change, ...]
    differ: int = 0


def summed(judged: Iterable[Change | None]) -> Replay:
    count = 0
    changes: list[Change] = []
    differ = 0
    for change in judged:
        count += 1
        if change is not None:
            differ += 1
            if differ <= CHANGES_MAX:
                changes.append(change)
    return Replay(judged=count, changes=tuple(changes), differ=differ)


def judge(entry: Logged, policies: PolicySet, against: PolicySet | None) -> Change | None:
    """One logged decision again; None when it comes out alike.

    against   compared with what these decide; None: with what was decided
    """
    snapshot = from_record(entry.snapshot)
    before = entry.decision if against is None else decide(against, snapshot, entry.demand)
    after = decide(policies, snapshot, entry.demand)
    if _answer(after) == _answer(before):
        return None
    return Change(demand=entry.demand, before=before, after=after, why=tuple(_why(before, after)))


def _answer(decision: Decision) -> tuple[object, ...]:
    came_out = decision.outcome, decision.lease_class, decision.places, decision.evict, decision.blocked_by
    return *came_out, decision.priority, _turn(decision)


def _turn(decision: Decision) -> tuple[str, ...]:
    """The tenants that wait, in the order in which they are served; nothing where only one does."""
    if len(decision.standings) < 2:
        return ()
    return tuple(one.tenant for one in sorted(decision.standings, key=lambda one: one.level))


def _why(before: Decision, after: Decision) -> list[str]:
    lines = [f"no longer: {_fired(one)}" for one in before.fired if one not in after.fired]
    lines += [f"now: {_fired(one)}" for one in after.fired if one not in before.fired]
    if before.reason != after.reason:
        lines += [f"was: {before.reason}"] * bool(before.reason)
        lines += [f"is: {after.reason}"] * bool(after.reason)
    for old, new in zip(before.candidates, after.candidates, strict=False):
        if old.node == new.node and old.denied_by != new.denied_by:
            lines.append(f"{new.node}: {_refusal(old.denied_by)} -> {_refusal(new.denied_by)}")
    if _turn(before) != _turn(after):
        lines.append(f"served in the order {', '.join(_turn(after))} instead of {', '.join(_turn(before))}")
    if before.evict != after.evict:
        lines.append(f"asked to leave: {_listed(after.evict)} instead of {_listed(before.evict)}")
    if before.places != after.places and before.outcome == after.outcome == "grant":
        lines.append(f"placed on {_listed(after.places)} instead of {_listed(before.places)}")
    return lines


def _fired(fired: Fired) -> str:
    return f"rule {fired.rule!r} ({fired.action}): {fired.effect}"


def _refusal(denied_by: str) -> str:
    return f"refused by rule {denied_by!r}" if denied_by else "open"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "nobody"
