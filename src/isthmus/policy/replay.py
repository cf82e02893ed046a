"""Decide logged requests again under other policies: what would have changed.

Invariant: pure. Each logged decision is judged against the snapshot that it had; a different answer earlier
in the log does not change the later snapshots (that would be a simulation, not a replay).
"""

from collections.abc import Iterable

from isthmus.core.model import Record
from isthmus.policy.decide import Decision, decide
from isthmus.policy.rules import PolicySet
from isthmus.policy.snapshot import Demand, SnapshotRecord, from_record


class Logged(Record, frozen=True):
    """One entry of the decision log."""

    demand: Demand
    snapshot: SnapshotRecord
    decision: Decision


class Change(Record, frozen=True):
    demand: Demand
    before: Decision
    after: Decision


class Replay(Record, frozen=True):
    """`judged` decisions, of which `changes` would have come out differently (outcome, class, places or
    evictions).
    """

    judged: int
    changes: tuple[Change, ...]


def replay(log: Iterable[Logged], policies: PolicySet) -> Replay:
    judged = 0
    changes: list[Change] = []
    for entry in log:
        judged += 1
        after = decide(policies, from_record(entry.snapshot), entry.demand)
        if _answer(after) != _answer(entry.decision):
            changes.append(Change(demand=entry.demand, before=entry.decision, after=after))
    return Replay(judged=judged, changes=tuple(changes))


def _answer(decision: Decision) -> tuple[object, ...]:
    return decision.outcome, decision.lease_class, decision.places, decision.evict, decision.blocked_by
