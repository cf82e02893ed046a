"""The decision log, judged again."""

import msgspec

from isthmus.core.ids import TenantId
from isthmus.policy import ALLOW_ALL, Logged, PolicySet, Replay, decide, load_policies
from isthmus.policy.replay import judge, summed
from isthmus.policy.snapshot import Holding
from tests.unit.policy.situations import demand, node, snapshot


def _log() -> list[Logged]:
    situation = snapshot(node("a", free=2), node("b"))
    demands = [demand(tenant=tenant) for tenant in ("alice", "bob", "alice")]
    return [
        Logged(demand=wanted, snapshot=situation.record(), decision=decide(ALLOW_ALL, situation, wanted))
        for wanted in demands
    ]


def _replay(log: list[Logged], policies: PolicySet, against: PolicySet | None = None) -> Replay:
    return summed(judge(entry, policies, against) for entry in log)


def test_the_same_policies_change_nothing() -> None:
    result = _replay(_log(), ALLOW_ALL)
    assert (result.judged, result.changes) == (3, ())


def test_other_policies_tell_what_they_would_have_changed() -> None:
    stricter = load_policies("[[rule]]\nname = 'no'\nthen = 'deny'\nwhen = 'tenant.name == \"bob\"'\n")
    result = _replay(_log(), stricter)
    assert [change.demand.tenant for change in result.changes] == ["bob"]
    assert (result.changes[0].before.outcome, result.changes[0].after.outcome) == ("grant", "deny")


def test_two_policies_are_compared_with_each_other_and_the_reason_is_told() -> None:
    lax = load_policies("[[rule]]\nname = 'late'\nthen = 'deny'\nwhen = 'clock.hour >= 20'\n")
    strict = load_policies(
        "[[rule]]\nname = 'no bob'\nthen = 'deny'\nwhen = 'tenant.name == \"bob\"'\nmessage = 'not bob'\n"
        "[[rule]]\nname = 'b first'\nthen = 'prefer'\nwhen = 'node.name == \"b\"'\nweight = 5\n"
    )
    result = _replay(_log(), strict, lax)
    assert (result.judged, result.differ) == (3, 3)
    assert "now: rule 'no bob' (deny): refused" in result.changes[1].why
    assert "is: rule 'no bob': not bob" in result.changes[1].why
    assert result.changes[0].why == ("placed on b instead of a",)
    assert _replay(_log(), lax, lax).differ == 0


def test_other_weights_change_whose_turn_it_is() -> None:
    held = {"alice": Holding(cores=2, leases=1), "bob": Holding(cores=1, leases=1)}
    waiting = (TenantId("alice"), TenantId("bob"))
    full = msgspec.structs.replace(snapshot(node("a", free=0), held=held), waiting=waiting)
    log = [Logged(demand=demand(), snapshot=full.record(), decision=decide(ALLOW_ALL, full, demand()))]
    result = _replay(log, load_policies("[tenants.alice]\nweight = 4.0\n"))
    assert result.changes[0].why == ("served in the order alice, bob instead of bob, alice",)
