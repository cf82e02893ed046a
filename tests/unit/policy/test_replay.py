"""The decision log, judged again."""

from isthmus.policy import ALLOW_ALL, Logged, decide, load_policies, replay
from tests.unit.policy.situations import demand, node, snapshot


def _log() -> list[Logged]:
    situation = snapshot(node("a", free=2), node("b"))
    demands = [demand(tenant=tenant) for tenant in ("alice", "bob", "alice")]
    return [
        Logged(demand=wanted, snapshot=situation.record(), decision=decide(ALLOW_ALL, situation, wanted))
        for wanted in demands
    ]


def test_the_same_policies_change_nothing() -> None:
    result = replay(_log(), ALLOW_ALL)
    assert (result.judged, result.changes) == (3, ())


def test_other_policies_tell_what_they_would_have_changed() -> None:
    stricter = load_policies("[[rule]]\nname = 'no'\nthen = 'deny'\nwhen = 'tenant.name == \"bob\"'\n")
    result = replay(_log(), stricter)
    assert [change.demand.tenant for change in result.changes] == ["bob"]
    assert (result.changes[0].before.outcome, result.changes[0].after.outcome) == ("grant", "deny")
