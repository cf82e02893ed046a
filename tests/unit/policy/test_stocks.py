"""Licences: counted over the whole site, whatever node they are used on."""

import msgspec
import pytest

from isthmus.core.ids import TenantId
from isthmus.core.kinds import Stock
from isthmus.core.model import POOL_PLATFORM, LeaseClass, Quota, Resources
from isthmus.policy import Decision, Demand, Snapshot, decide, fairness, in_words, load_policies
from isthmus.policy.rules import ALLOW_ALL, PolicySet
from isthmus.policy.snapshot import Holding, Pool, Preemptible, Used, from_record
from tests.unit.policy.situations import demand, elastic, node, snapshot

MATLAB = "licenses.matlab"
ALICE, BOB = TenantId("alice"), TenantId("bob")


def site(
    held: dict[str, int] | None = None,
    total: int = 4,
    others: int = 0,
    preemptible: tuple[Preemptible, ...] = (),
) -> Snapshot:
    """One large node, and licences; held: by tenant."""
    holdings = {
        name: Holding(cores=count, leases=count, amounts={MATLAB: count})
        for name, count in (held or {}).items()
    }
    situation = snapshot(node("n", free=64, cores=64), held=holdings, preemptible=preemptible)
    return msgspec.structs.replace(situation, stocks={MATLAB: Stock(total=total, others=others)})


def asks(matlab: int = 1, count: int = 1, quota: Quota = Quota(), **more: object) -> Demand:
    plain = demand(count=count, quota=quota, **more)  # type: ignore[arg-type]
    resources = Resources(licenses={"matlab": matlab})
    return msgspec.structs.replace(plain, lease=msgspec.structs.replace(plain.lease, resources=resources))


def holding(name: str, matlab: int = 1, **more: object) -> Preemptible:
    return msgspec.structs.replace(elastic(name, "n", **more), amounts={MATLAB: matlab})  # type: ignore[arg-type]


def verdict(situation: Snapshot, asked: Demand, policies: PolicySet = ALLOW_ALL) -> Decision:
    decision = decide(policies, situation, asked)
    replayed = decide(policies, from_record(situation.record()), asked)
    assert replayed == decision
    return decision


def test_what_is_free_is_granted_and_the_rest_waits_with_the_numbers() -> None:
    assert verdict(site({"bob": 3}), asks(1)).outcome == "grant"
    waiting = verdict(site({"bob": 3}), asks(2))
    assert (waiting.outcome, waiting.blocked_by) == ("wait", "capacity")
    assert waiting.reason == "3 of 4 'matlab' licences are held; each lease needs 2"
    words = in_words(asks(2), waiting)[0]
    assert "1 elastic lease of 1 core, 1.0 GiB, 2 'matlab' licences" in words
    assert waiting.reason in words


def test_what_others_hold_outside_the_site_is_not_free() -> None:
    decision = verdict(site({"bob": 1}, others=3), asks(1))
    assert decision.reason == (
        "4 of 4 'matlab' licences are held (3 of them outside this site); each lease needs 1"
    )


def test_as_many_leases_as_there_are_licences_are_granted() -> None:
    decision = verdict(site(), asks(2, count=10))
    assert (decision.outcome, len(decision.places)) == ("grant", 2)
    assert "0 of 4 'matlab' licences are held; each lease needs 2" in decision.reason


def test_more_than_there_are_is_denied_with_what_there_is() -> None:
    refused = verdict(site(), asks(5))
    assert (refused.outcome, refused.blocked_by) == ("deny", "size")
    assert refused.reason == "the site has 4 'matlab' licences, and 5 are asked for"
    together = verdict(site(), asks(2, count=3, together=True))
    assert together.reason == "the site has 4 'matlab' licences, and 6 are asked for"
    unknown = msgspec.structs.replace(site(), stocks={"licenses.ansys": Stock(total=2)})
    assert verdict(unknown, asks(1)).reason == (
        "the site has no 'matlab' licences, and 1 are asked for; it has 2 'ansys' licences"
    )


def test_before_the_platform_was_asked_nothing_is_denied_for_ever() -> None:
    nothing_known = snapshot()
    assert verdict(nothing_known, asks(1)).outcome == "wait"


def test_a_quota_and_a_cap_hold_for_licences() -> None:
    refused = verdict(site({"alice": 1}), asks(1, quota=Quota(licenses={"matlab": 1})))
    assert (refused.outcome, refused.blocked_by) == ("wait", "quota")
    assert refused.reason == (
        "tenant alice may hold 1 'matlab' licences and holds 1; each lease needs 1 more"
    )
    capped = load_policies(
        "[[rule]]\nname = 'few'\nthen = 'cap'\nper = 'site'\nlicenses = { matlab = 2 }\n"
        "when = 'has(request.licenses.matlab)'\n"
    )
    assert verdict(site({"bob": 1}), asks(1), capped).outcome == "grant"
    decision = verdict(site({"bob": 2}), asks(1), capped)
    assert decision.reason.startswith("rule 'few', per site may hold 2 'matlab' licences and holds 2")


def test_rules_see_what_is_asked_for_and_what_the_tenant_holds() -> None:
    rules = load_policies(
        "[[rule]]\nname = 'one each'\nthen = 'deny'\n"
        "when = 'has(request.licenses.matlab) && has(tenant.licenses.matlab)'\n"
    )
    assert verdict(site({"alice": 1}), asks(1), rules).blocked_by == "rule"
    assert verdict(site({"bob": 1}), asks(1), rules).outcome == "grant"
    assert verdict(site({"alice": 1}), demand(), rules).outcome == "grant"


def test_idle_leases_go_for_who_waits_for_their_licences_the_youngest_first() -> None:
    idle = (holding("old", age=9, idle=True), holding("young", age=1, idle=True), holding("busy"))
    decision = verdict(site({"bob": 4}, preemptible=idle), asks(1))
    assert decision.evict == ("young",)
    assert decision.reason.endswith("; 1 idle leases are asked to leave")
    assert verdict(site({"bob": 4}, preemptible=idle), asks(2)).evict == ("young", "old")
    assert verdict(site({"bob": 4}, preemptible=idle), asks(3)).evict == ()  # it would not be enough
    leaving = (holding("gone", idle=True, leaving=True), *idle)
    assert verdict(site({"bob": 4}, preemptible=leaving), asks(1)).evict == ()


def test_the_dominant_share_may_be_one_of_licences() -> None:
    situation = site({"alice": 2, "bob": 1})
    alice = fairness.standing(ALLOW_ALL, situation, ALICE)
    assert (alice.dominant, alice.held) == (MATLAB, 0.5)
    ranked = fairness.standings(ALLOW_ALL, situation, [ALICE, BOB])
    assert [one.tenant for one in ranked] == [BOB, ALICE]
    words = in_words(asks(1), verdict(situation, asks(1)))
    assert any("alice holds 50.00% of the site's 'matlab' licences" in line for line in words)


def test_licences_used_lately_count_like_cores() -> None:
    a_day_s = 86400.0
    situation = site()
    used = {ALICE: Used(amount_s={MATLAB: 4 * a_day_s}, at_s=situation.clock_s)}
    situation = msgspec.structs.replace(situation, used=used)
    alice = fairness.standing(ALLOW_ALL, situation, ALICE)
    assert (alice.dominant, alice.held) == (MATLAB, 0.0)
    assert alice.used > 0.5
    later = fairness.spend(used[ALICE], Used(at_s=situation.clock_s + a_day_s), a_day_s)
    assert later.amount_s == {MATLAB: pytest.approx(2 * a_day_s)}


@pytest.mark.parametrize("name", ["", "a b", "matlab,ansys", "--x", "m" * 101, "matlab:2"])
def test_a_name_that_no_licence_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name of a licence"):
        Resources(licenses={name: 1})
    with pytest.raises(msgspec.ValidationError, match="name of a licence"):
        msgspec.convert({"licenses": {name: 1}}, Resources)


def test_resources_with_licences_are_keys_like_others() -> None:
    one = Resources(2, licenses={"a": 1, "b": 2})
    assert {one: 1}[Resources(2, licenses={"b": 2, "a": 1})] == 1
    assert one != Resources(2)
    assert Resources(licenses={"a": 0}).amounts == {}


def test_a_harvested_lease_asks_for_licences_like_any_other() -> None:
    decision = verdict(site({"bob": 4}), asks(1, lease_class=LeaseClass.HARVESTED))
    assert decision.blocked_by == "capacity"


GUARANTEED = load_policies(
    "[tenants.alice]\nguarantee = { cores = 4, memory = '8GiB', licenses = { matlab = 2 } }\n"
)


def lent_to_bob(count: int = 4, cores: int = 1) -> tuple[Preemptible, ...]:
    return tuple(
        msgspec.structs.replace(holding(f"b{number}", age=float(number), cores=cores), tenant=BOB)
        for number in range(count)
    )


def test_a_guarantee_of_licences_comes_back_from_those_who_borrow_it() -> None:
    full = site({"bob": 4}, preemptible=lent_to_bob())
    decision = verdict(full, asks(1), GUARANTEED)
    assert (decision.outcome, decision.evict) == ("wait", ("b0",))
    assert decision.reason.endswith("; 1 borrowing leases are asked to leave")
    assert verdict(full, asks(2), GUARANTEED).evict == ("b0", "b1")
    assert verdict(full, asks(3), GUARANTEED).evict == ()  # beyond it
    assert verdict(full, asks(1, tenant="carol"), GUARANTEED).evict == ()
    cores_only = load_policies("[tenants.alice]\nguarantee = { cores = 4 }\n")
    assert verdict(full, asks(1), cores_only).evict == ()


def test_nobody_is_pushed_below_the_licences_it_is_guaranteed_itself() -> None:
    both = load_policies(GUARANTEED.text + "[tenants.bob]\nguarantee = { licenses = { matlab = 3 } }\n")
    full = site({"bob": 4}, preemptible=lent_to_bob())
    assert verdict(full, asks(1), both).evict == ("b0",)
    assert verdict(full, asks(2), both).evict == ()


def test_what_is_leaving_already_keeps_no_guarantee() -> None:
    both = load_policies(GUARANTEED.text + "[tenants.bob]\nguarantee = { licenses = { matlab = 2 } }\n")
    going, *staying = lent_to_bob()
    full = site({"bob": 4}, preemptible=(msgspec.structs.replace(going, leaving=True), *staying))
    assert verdict(full, asks(2), both).evict == ("b1",)
    three = load_policies(GUARANTEED.text + "[tenants.bob]\nguarantee = { licenses = { matlab = 3 } }\n")
    assert verdict(full, asks(2), three).evict == ()


def test_licences_that_are_not_lent_stay_free() -> None:
    hoarding = load_policies("[tenants.alice]\nlend = false\nguarantee = { licenses = { matlab = 2 } }\n")
    decision = verdict(site({"bob": 2}), asks(1, tenant="bob"), hoarding)
    assert (decision.outcome, decision.blocked_by) == ("wait", "guarantee")
    assert decision.reason == "what is free is guaranteed to alice (2 'matlab' licences)"
    assert verdict(site({"bob": 1}), asks(1, tenant="bob"), hoarding).outcome == "grant"
    assert verdict(site({"bob": 2}), asks(1), hoarding).outcome == "grant"


def test_where_a_rule_says_so_a_reserved_request_takes_licences_from_elastic_leases() -> None:
    rules = load_policies(
        "[[rule]]\nname = 'first'\nthen = 'allow'\npreempt = true\nwhen = 'request.class == \"reserved\"'\n"
    )
    full = site({"bob": 4}, preemptible=lent_to_bob())
    decision = verdict(full, asks(2, lease_class=LeaseClass.RESERVED), rules)
    assert decision.evict == ("b0", "b1")
    assert decision.reason.endswith("; 2 elastic leases are asked to leave")
    assert verdict(full, asks(2), rules).evict == ()


ANSYS = "licenses.ansys"


def idle_ones(**amounts: dict[str, int]) -> tuple[Preemptible, ...]:
    """Idle leases, the first the youngest; amounts: of each, by its name."""
    return tuple(
        msgspec.structs.replace(
            elastic(name, "n", age=float(age), idle=True), tenant=BOB, amounts=amounts[name]
        )
        for age, name in enumerate(amounts)
    )


def full_of_both(*preemptible: Preemptible, free: int = 64) -> Snapshot:
    """Every licence is held, and of the node's 64 cores `free` are not."""
    bob = Holding(cores=64 - free, leases=4, amounts={MATLAB: 4, ANSYS: 2})
    situation = snapshot(node("n", free=free, cores=64), held={"bob": bob}, preemptible=preemptible)
    return msgspec.structs.replace(situation, stocks={MATLAB: Stock(total=4), ANSYS: Stock(total=2)})


def asks_both(cores: int = 1, **more: object) -> Demand:
    plain = demand(**more)  # type: ignore[arg-type]
    resources = Resources(cores=cores, licenses={"matlab": 1, "ansys": 1})
    return msgspec.structs.replace(plain, lease=msgspec.structs.replace(plain.lease, resources=resources))


def test_nobody_goes_for_one_licence_while_another_is_not_to_be_had() -> None:
    matlab, ansys = idle_ones(m={MATLAB: 1}), idle_ones(a={ANSYS: 1})
    assert verdict(full_of_both(*matlab), asks_both()).evict == ()
    assert verdict(full_of_both(*ansys), asks_both()).evict == ()
    decision = verdict(full_of_both(*matlab, *ansys), asks_both())
    assert sorted(decision.evict) == ["a", "m"]
    assert decision.reason.endswith("; 2 idle leases are asked to leave")


def test_a_lease_that_holds_two_kinds_counts_for_both() -> None:
    both = idle_ones(b={MATLAB: 1, ANSYS: 1}, m={MATLAB: 1}, a={ANSYS: 1})
    assert verdict(full_of_both(*both), asks_both()).evict == ("b",)
    leaving = msgspec.structs.replace(both[2], leaving=True)
    assert verdict(full_of_both(both[1], leaving), asks_both()).evict == ("m",)


def test_nobody_goes_for_a_licence_while_cores_are_not_to_be_had() -> None:
    held = idle_ones(m={MATLAB: 1}, a={ANSYS: 1})
    assert verdict(full_of_both(*held, free=0), asks_both(cores=3)).evict == ()
    assert verdict(full_of_both(*held, free=0), asks_both(cores=2)).evict == ("m", "a"), "theirs are enough"
    more = idle_ones(m={MATLAB: 1}, a={ANSYS: 1}, plain={}, spare={})
    assert verdict(full_of_both(*more, free=0), asks_both(cores=3)).evict == ("m", "a", "plain")


def test_nobody_goes_for_a_licence_while_a_quota_is_in_the_way() -> None:
    full = full_of_both(*idle_ones(m={MATLAB: 2}, a={ANSYS: 2}))
    assert verdict(full, asks_both(count=2, together=True)).evict == ("m", "a")
    alice = {**full.tenants, ALICE: Holding(cores=1, leases=1)}
    full = msgspec.structs.replace(full, tenants=alice)
    two = asks_both(count=2, together=True, quota=Quota(leases=2))
    assert verdict(full, two).blocked_by == "capacity"
    assert verdict(full, two).evict == ()


def test_nobody_goes_for_a_licence_that_is_guaranteed_to_a_third() -> None:
    rules = load_policies(
        "[[rule]]\nname = 'first'\nthen = 'allow'\npreempt = true\n"
        "[tenants.alice]\nguarantee = { licenses = { matlab = 2 } }\n"
    )
    for count, evicted in ((2, ()), (4, ("b0", "b1", "b2"))):
        full = site({"bob": 4}, preemptible=lent_to_bob(count))
        reserved = asks(1, tenant="carol", lease_class=LeaseClass.RESERVED)
        assert verdict(full, reserved, rules).evict == evicted, count


def test_what_can_never_be_had_is_denied_even_where_something_else_is_lacking_now() -> None:
    crowded = msgspec.structs.replace(site(), pools={"default": Pool(maximum=1, held=Holding(leases=1))})
    refused = verdict(crowded, asks(5))
    assert (refused.outcome, refused.blocked_by) == ("deny", "size")
    too_many = demand(cores=9, quota=Quota(cores=8))
    refused = verdict(crowded, too_many)
    assert (refused.outcome, refused.blocked_by) == ("deny", "quota")


def test_what_does_not_start_on_a_pools_node_pushes_nobody_off_it() -> None:
    rules = load_policies("[[rule]]\nname = 'first'\nthen = 'allow'\npreempt = true\n")
    nodes = (node("n", free=0, cores=4, platform=POOL_PLATFORM), node("m", free=0, cores=4))
    reserved = demand(cores=1, lease_class=LeaseClass.RESERVED)
    there, elsewhere = elastic("pooled", "n"), elastic("other", "m", age=9.0)
    assert verdict(snapshot(*nodes, preemptible=(there,)), reserved, rules).evict == ()
    assert verdict(snapshot(*nodes, preemptible=(there, elsewhere)), reserved, rules).evict == ("other",)
