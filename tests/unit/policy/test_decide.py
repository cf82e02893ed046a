"""Decisions: what is granted, what waits, what is denied, and why."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.model import LeaseClass, Quota
from isthmus.policy import ALLOW_ALL, Decision, decide, in_words, load_policies
from isthmus.policy.snapshot import Holding, Pool, SnapshotRecord, from_record
from isthmus.policy.weighing import CANDIDATES_MAX, SHAPES_MAX
from tests.unit.policy.situations import demand, elastic, node, snapshot


def _rule(name: str, then: str, when: str = "true", **parameters: object) -> str:
    lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in parameters.items()]
    return "\n".join(["[[rule]]", f"name = '{name}'", f'when = """{when}"""', f"then = '{then}'", *lines, ""])


def test_without_rules_what_fits_is_granted_on_the_fullest_node() -> None:
    decision = decide(ALLOW_ALL, snapshot(node("empty"), node("fuller", free=2)), demand())
    assert decision.outcome == "grant"
    assert decision.places == ("fuller",)


def test_a_lease_without_gpus_avoids_nodes_that_have_some() -> None:
    decision = decide(ALLOW_ALL, snapshot(node("gpus", free=2, gpus=4), node("plain")), demand())
    assert decision.places == ("plain",)


def test_closed_nodes_get_nothing() -> None:
    decision = decide(ALLOW_ALL, snapshot(node("silent", is_open=False)), demand())
    assert (decision.outcome, decision.blocked_by) == ("wait", "capacity")


def test_a_count_is_laid_out_over_nodes_and_may_fall_short() -> None:
    situation = snapshot(node("a", free=2), node("b", free=1))
    decision = decide(ALLOW_ALL, situation, demand(count=5))
    assert sorted(decision.places) == ["a", "a", "b"]
    assert "3 of 5" in decision.reason


def test_together_is_all_or_none() -> None:
    situation = snapshot(node("a", free=2), node("b", free=1))
    assert decide(ALLOW_ALL, situation, demand(count=4, together=True)).outcome == "wait"
    assert len(decide(ALLOW_ALL, situation, demand(count=3, together=True)).places) == 3


def test_what_no_node_could_ever_hold_is_denied_with_the_largest() -> None:
    decision = decide(ALLOW_ALL, snapshot(node("a", free=0, cores=4), node("b", cores=8)), demand(cores=64))
    assert (decision.outcome, decision.blocked_by) == ("deny", "size")
    assert "most: 8 on b" in decision.reason


def test_a_group_larger_than_all_nodes_is_denied_with_what_would_fit() -> None:
    situation = snapshot(node("a", free=0, cores=4), node("b", free=2, cores=8))
    decision = decide(ALLOW_ALL, situation, demand(cores=3, count=4, together=True))
    assert (decision.outcome, decision.blocked_by) == ("deny", "size")
    assert "all nodes together hold 3 such" in decision.reason
    assert decide(ALLOW_ALL, situation, demand(cores=3, count=3, together=True)).outcome == "wait"


def test_harvested_leases_wait_while_no_batch_job_lends() -> None:
    decision = decide(ALLOW_ALL, snapshot(node("a")), demand(cores=8, lease_class=LeaseClass.HARVESTED))
    assert (decision.outcome, decision.blocked_by) == ("wait", "capacity")
    assert "no batch job lends its idle cores now" in decision.reason


def test_lent_nodes_are_for_harvested_leases_and_harvested_leases_for_them() -> None:
    situation = snapshot(node("own", free=1), node("n1.job7", platform="lent", partition="batch"))
    harvested = decide(ALLOW_ALL, situation, demand(count=9, lease_class=LeaseClass.HARVESTED))
    assert set(harvested.places) == {"n1.job7"}
    assert decide(ALLOW_ALL, situation, demand(count=9)).places == ("own",)
    assert decide(ALLOW_ALL, situation, demand(cores=5)).blocked_by == "size"


def test_rules_say_whose_cores_may_be_harvested() -> None:
    rules = _rule("spare urgent jobs", "deny", "node.labels.partition == 'urgent'")
    situation = snapshot(
        node("n1.job7", free=2, platform="lent", partition="urgent"),
        node("n2.job8", platform="lent", partition="batch"),
    )
    decision = decide(load_policies(rules, "f"), situation, demand(lease_class=LeaseClass.HARVESTED))
    assert decision.places == ("n2.job8",)


def test_an_unknown_pool_is_denied_with_the_known_ones() -> None:
    decision = decide(ALLOW_ALL, snapshot(node("a")), demand(pool="fast"))
    assert (decision.outcome, decision.blocked_by) == ("deny", "pool")
    assert "'fast'" in decision.reason
    assert "default" in decision.reason


def test_a_full_pool_makes_wait() -> None:
    pools = {"default": Pool(maximum=2, held=Holding(leases=2))}
    decision = decide(ALLOW_ALL, snapshot(node("a"), pools=pools), demand())
    assert (decision.outcome, decision.blocked_by) == ("wait", "pool")


def test_a_quota_makes_wait_until_something_is_given_back() -> None:
    situation = snapshot(node("a"), held={"alice": Holding(cores=2, leases=2)})
    decision = decide(ALLOW_ALL, situation, demand(quota=Quota(cores=2)))
    assert (decision.outcome, decision.blocked_by) == ("wait", "quota")
    assert decide(ALLOW_ALL, situation, demand(tenant="bob", quota=Quota(cores=2))).outcome == "grant"


def test_a_quota_that_the_request_alone_exceeds_denies_it() -> None:
    assert decide(ALLOW_ALL, snapshot(node("a")), demand(cores=3, quota=Quota(cores=2))).outcome == "deny"


def test_a_quota_cuts_a_count_down() -> None:
    decision = decide(ALLOW_ALL, snapshot(node("a")), demand(count=4, quota=Quota(leases=2)))
    assert len(decision.places) == 2
    assert "may hold 2 leases" in decision.reason


def test_a_deny_rule_refuses_with_its_message() -> None:
    policies = load_policies(_rule("no", "deny", 'tenant.name == "alice"', message="ask Bob"))
    decision = decide(policies, snapshot(node("a")), demand())
    assert decision.outcome == "deny"
    assert "ask Bob" in decision.reason
    assert decide(policies, snapshot(node("a")), demand(tenant="bob")).outcome == "grant"


def test_the_first_matching_allow_or_deny_settles_it() -> None:
    policies = load_policies(_rule("no", "deny") + _rule("yes", "allow", 'tenant.name == "bob"', priority=1))
    assert decide(policies, snapshot(node("a")), demand(tenant="bob")).outcome == "grant"
    assert decide(policies, snapshot(node("a")), demand(tenant="eve")).outcome == "deny"


def test_a_node_can_be_denied_and_another_takes_the_lease() -> None:
    policies = load_policies(_rule("not here", "deny", 'node.name == "a"'))
    decision = decide(policies, snapshot(node("a", free=1), node("b")), demand())
    assert decision.places == ("b",)
    assert [c.denied_by for c in decision.candidates if c.node == "a"] == ["not here"]


def test_a_node_can_be_allowed_before_everything_else_is_denied() -> None:
    only_eu = _rule("only eu", "allow", 'node.labels.zone == "eu"')
    policies = load_policies(only_eu + _rule("rest", "deny"))
    situation = snapshot(node("a", free=1, zone="us"), node("b", zone="eu"))
    assert decide(policies, situation, demand()).places == ("b",)
    alone = decide(policies, snapshot(node("a", zone="us")), demand())
    assert (alone.outcome, alone.blocked_by) == ("deny", "rule")


def test_preferences_add_up_and_beat_packing() -> None:
    rules = _rule("eu", "prefer", 'node.labels.zone == "eu"', weight=2) + _rule(
        "roomy", "prefer", "node.free_cores >= 4", weight=-5
    )
    situation = snapshot(
        node("roomy", zone="eu"), node("tight", free=1, zone="us"), node("eu", free=3, zone="eu")
    )
    assert decide(load_policies(rules), situation, demand()).places == ("eu",)


def test_caps_bind_per_tenant_pool_and_site() -> None:
    held = {"alice": Holding(cores=2, leases=2), "bob": Holding(cores=1, leases=1)}
    pools = {"default": Pool(held=Holding(cores=3, leases=3))}
    situation = snapshot(node("a"), held=held, pools=pools)
    cases = [("tenant", 2, "wait"), ("tenant", 3, "grant"), ("pool", 3, "wait")]
    for per, cores, outcome in [*cases, ("site", 3, "wait"), ("site", 4, "grant")]:
        policies = load_policies(_rule("cap", "cap", cores=cores, per=per))
        assert decide(policies, situation, demand()).outcome == outcome, (per, cores)


def test_a_rule_can_change_the_class() -> None:
    policies = load_policies(_rule("down", "class", "request.class == 'reserved'", **{"class": "elastic"}))
    decision = decide(policies, snapshot(node("a")), demand(lease_class=LeaseClass.RESERVED))
    assert decision.lease_class is LeaseClass.ELASTIC


def test_rules_read_labels_of_requests_and_the_clock() -> None:
    policies = load_policies(
        _rule(
            "work",
            "deny",
            "has(request.labels.fun) && clock.hour >= 9 && clock.hour < 17 && clock.weekday < 5",
        )
    )
    noon = snapshot(node("a"))
    night = snapshot(node("a"), clock_s=3600.0)
    assert decide(policies, noon, demand(fun="yes")).outcome == "deny"
    assert decide(policies, noon, demand()).outcome == "grant"
    assert decide(policies, night, demand(fun="yes")).outcome == "grant"


def test_a_condition_that_fails_matches_only_where_it_forbids() -> None:
    missing = 'request.labels.team == "x"'
    assert decide(load_policies(_rule("a", "deny", missing)), snapshot(node("a")), demand()).outcome == "deny"
    capped = load_policies(_rule("a", "cap", missing, leases=1))
    assert len(decide(capped, snapshot(node("a")), demand(count=2)).places) == 2


@pytest.mark.parametrize("condition", ['node["name"] == "a"', 'node["labels"]["zone"] == "eu"'])
def test_a_condition_may_index_what_it_reads(condition: str) -> None:
    policies = load_policies(_rule("not here", "deny", condition))
    situation = snapshot(node("a", free=1, zone="eu"), node("b", zone="us"))
    assert decide(policies, situation, demand()).places == ("b",)


def test_a_judgement_of_nodes_is_not_remembered_for_other_signals() -> None:
    dirty = 'node.platform == "local" && signal["carbon"] > 400.0'
    policies = load_policies(_rule("dirty", "deny", dirty))
    for carbon, outcome in ((500.0, "deny"), (100.0, "grant"), (500.0, "deny")):
        situation = msgspec.structs.replace(snapshot(node("a")), signals={"carbon": carbon})
        assert decide(policies, situation, demand()).outcome == outcome, carbon


@pytest.mark.parametrize(
    "condition",
    [
        "1 / tenant.gpus > 1",
        "request.count % tenant.gpus == 0",
        "request.memory * request.memory * request.memory > 1",
        "[1][request.cores] == 1",
        "int(tenant.name) == 1",
        'timestamp(tenant.name) == timestamp("1970-01-01T00:00:00Z")',
    ],
)
def test_no_condition_breaks_a_decision(condition: str) -> None:
    denied = decide(load_policies(_rule("a", "deny", condition)), snapshot(node("a")), demand())
    capped = decide(
        load_policies(_rule("a", "cap", condition, leases=1)), snapshot(node("a")), demand(count=2)
    )
    assert (denied.outcome, len(capped.places)) == ("deny", 2)


def test_reserved_leases_push_elastic_ones_out_only_by_policy() -> None:
    full = snapshot(
        node("a", free=0),
        preemptible=(elastic("old", "a", age=10), elastic("young", "a"), elastic("mid", "a", age=5)),
    )
    reserved = demand(cores=2, lease_class=LeaseClass.RESERVED)
    assert decide(ALLOW_ALL, full, reserved).evict == ()
    policies = load_policies(_rule("paid", "allow", "request.class == 'reserved'", preempt=True))
    decision = decide(policies, full, reserved)
    assert decision.outcome == "wait"
    assert decision.evict == ("young", "mid")
    assert decide(policies, full, demand(cores=2)).evict == ()


def test_idle_leases_make_room_for_any_request_and_working_ones_do_not() -> None:
    full = snapshot(node("a", free=0), preemptible=(elastic("busy", "a"), elastic("idle", "a", idle=True)))
    decision = decide(ALLOW_ALL, full, demand())
    assert (decision.outcome, decision.evict) == ("wait", ("idle",))
    assert "1 idle leases are asked to leave" in decision.reason
    assert decide(ALLOW_ALL, full, demand(cores=2)).evict == ()


def test_leases_that_are_leaving_already_are_not_joined_by_others() -> None:
    policies = load_policies(_rule("paid", "allow", preempt=True))
    full = snapshot(
        node("a", free=0), preemptible=(elastic("going", "a", leaving=True), elastic("staying", "a"))
    )
    assert decide(policies, full, demand(lease_class=LeaseClass.RESERVED)).evict == ()


def test_more_shapes_than_are_judged_together_still_obey_every_prohibition() -> None:
    policies = load_policies(_rule("odd", "deny", "node.labels.parity == 'odd'"))
    rows = [
        node(f"n{i}", free=1 + i % 4, serial=str(i), parity=("even", "odd")[i % 2])
        for i in range(4 * SHAPES_MAX)
    ]
    decision = decide(policies, snapshot(*rows), demand(count=20))
    assert len(decision.places) == 20
    assert all(int(place[1:]) % 2 == 0 for place in decision.places)


def test_when_the_best_nodes_are_denied_the_next_best_are_looked_at() -> None:
    last = 5 * CANDIDATES_MAX
    policies = load_policies(_rule("not here", "deny", f'node.name != "n{last}"'))
    rows = [node(f"n{i}", free=1) for i in range(last)] + [node(f"n{last}", free=4)]
    assert decide(policies, snapshot(*rows), demand()).places == (f"n{last}",)


@pytest.mark.parametrize("count", [1, 3])
def test_a_decision_is_told_in_words(count: int) -> None:
    policies = load_policies(
        _rule("eu", "prefer", "node.labels.zone == 'eu'") + _rule("cap", "cap", leases=2)
    )
    wanted = demand(count=count)
    words = "\n".join(in_words(wanted, decide(policies, snapshot(node("a", zone="eu"), node("b")), wanted)))
    assert f"alice asked for {count} elastic lease" in words
    assert "a: score" in words
    assert "chosen" in words
    assert "Rule 'cap'" in words


free_cores = st.lists(st.integers(0, 8), min_size=1, max_size=40)


@given(free=free_cores, cores=st.integers(1, 4), count=st.integers(1, 30), together=st.booleans())
def test_no_decision_over_commits_a_node(free: list[int], cores: int, count: int, together: bool) -> None:
    rows = [node(f"n{i}", free=left, cores=8, zone=str(i % 3)) for i, left in enumerate(free)]
    policies = load_policies(_rule("not zone 2", "deny", "node.labels.zone == '2' || node.name == 'n0'"))
    decision = decide(policies, snapshot(*rows), demand(cores=cores, count=count, together=together))
    usable = {row.node: row.free_cores // cores for i, row in enumerate(rows) if i % 3 != 2 and i != 0}
    for place in set(decision.places):
        assert decision.places.count(place) <= usable[place]
    expected = min(count, sum(usable.values()))
    assert len(decision.places) == (0 if together and expected < count else expected)


@given(free=free_cores)
def test_a_snapshot_from_the_log_decides_the_same(free: list[int]) -> None:
    rows = [node(f"n{i}", free=left, cores=8, zone=str(i % 3)) for i, left in enumerate(free)]
    situation = snapshot(*rows, held={"alice": Holding(cores=1, leases=1)})
    logged = msgspec.msgpack.decode(msgspec.msgpack.encode(situation.record()), type=SnapshotRecord)
    policies = load_policies(_rule("z", "prefer", "node.labels.zone == '1'"))
    first, again = (decide(policies, s, demand(count=3)) for s in (situation, from_record(logged)))
    assert first == again
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(first), type=Decision) == first
