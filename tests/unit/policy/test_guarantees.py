"""What is guaranteed to a tenant, lent to others, and taken back from them."""

from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.ids import TenantId
from isthmus.core.model import LeaseClass, Quota
from isthmus.policy import Snapshot, decide, load_policies
from isthmus.policy.snapshot import Holding, Preemptible
from tests.unit.policy.situations import demand, elastic, node, snapshot

PHYSICS = load_policies("[tenants.physics]\nguarantee = { cores = 4 }\n")
HOARDING = load_policies("[tenants.physics]\nlend = false\nguarantee = { cores = 4 }\n")


def lease_of(tenant: str, lease: str, on: str = "a", cores: int = 1, age: float = 0.0) -> Preemptible:
    one = elastic(lease, on, cores=cores, age=age)
    return Preemptible(**{**{name: getattr(one, name) for name in one.__struct_fields__}, "tenant": tenant})


def test_what_is_not_used_of_a_guarantee_is_lent_to_elastic_leases_only() -> None:
    empty = snapshot(node("a"))
    assert decide(PHYSICS, empty, demand(cores=4)).outcome == "grant"
    refused = decide(PHYSICS, empty, demand(cores=1, lease_class=LeaseClass.RESERVED))
    assert (refused.outcome, refused.blocked_by) == ("wait", "guarantee")
    assert refused.reason == "what is free is guaranteed to physics (4 cores); elastic leases may borrow it"
    assert decide(PHYSICS, empty, demand("physics", 4, lease_class=LeaseClass.RESERVED)).outcome == "grant"


def test_who_lends_nothing_finds_its_guarantee_free() -> None:
    site = snapshot(node("a"), node("b"))
    decision = decide(HOARDING, site, demand(count=8))
    assert (decision.outcome, len(decision.places), decision.blocked_by) == ("grant", 4, "guarantee")


def test_no_guarantee_stands_in_the_way_of_harvesting() -> None:
    site = snapshot(node("a", free=0), node("n1.job7", platform="lent"))
    decision = decide(HOARDING, site, demand(count=4, lease_class=LeaseClass.HARVESTED))
    assert (decision.outcome, len(decision.places)) == ("grant", 4)


def test_a_borrower_is_pushed_out_when_the_lender_asks_and_not_further_than_the_guarantee() -> None:
    leases = tuple(lease_of("bob", f"l{i}", age=float(i)) for i in range(4))
    full = snapshot(node("a", free=0), held={"bob": Holding(cores=4, leases=4)}, preemptible=leases)
    decision = decide(PHYSICS, full, demand("physics", cores=2))
    assert (decision.outcome, decision.evict) == ("wait", ("l0", "l1"))
    assert "2 borrowing leases are asked to leave" in decision.reason
    assert decide(PHYSICS, full, demand("physics", cores=1, count=5, together=True)).evict == ()
    assert decide(PHYSICS, full, demand("carol", cores=2)).evict == ()


def test_a_request_beyond_its_guarantee_is_told_that_idle_leases_leave_for_it() -> None:
    leases = tuple(elastic(f"l{i}", "a", idle=True) for i in range(4))
    full = snapshot(node("a", free=0), held={"bob": Holding(cores=4, leases=4)}, preemptible=leases)
    smaller = load_policies("[tenants.physics]\nguarantee = { cores = 3 }\n")
    decision = decide(smaller, full, demand("physics", count=4, together=True))
    assert "4 idle leases are asked to leave" in decision.reason


def test_beyond_its_guarantee_a_tenant_pushes_nobody_out() -> None:
    held = {"bob": Holding(cores=1, leases=1), "physics": Holding(cores=3, leases=3)}
    full = snapshot(node("a", free=0), held=held, preemptible=(lease_of("bob", "l0"),))
    assert decide(PHYSICS, full, demand("physics", cores=1)).evict == ("l0",)
    held["physics"] = Holding(cores=4, leases=4)
    full = snapshot(node("a", free=0), held=held, preemptible=(lease_of("bob", "l0"),))
    assert decide(PHYSICS, full, demand("physics", cores=1)).evict == ()


def test_nobody_is_pushed_below_its_own_guarantee() -> None:
    policies = load_policies(
        "[tenants.physics]\nguarantee = { cores = 4 }\n[tenants.bob]\nguarantee = { cores = 3 }\n"
    )
    leases = tuple(lease_of("bob", f"l{i}") for i in range(4))
    full = snapshot(node("a", free=0), held={"bob": Holding(cores=4, leases=4)}, preemptible=leases)
    assert len(decide(policies, full, demand("physics", cores=1)).evict) == 1
    assert decide(policies, full, demand("physics", cores=2)).evict == ()


def test_who_stands_highest_is_pushed_out_first_wherever_it_is() -> None:
    leases = (lease_of("low", "l0"), lease_of("high", "h0", on="b"), lease_of("high", "h1", on="b"))
    held = {"low": Holding(cores=1, leases=1), "high": Holding(cores=7, leases=2)}
    full = snapshot(node("a", free=0), node("b", free=0), held=held, preemptible=leases)
    decision = decide(PHYSICS, full, demand("physics", cores=1))
    assert decision.evict[0] in ("h0", "h1")


def test_as_one_tenant_loses_leases_the_next_one_stands_highest() -> None:
    leases = tuple(lease_of(tenant, f"{tenant}{i}") for tenant in ("bob", "carol") for i in range(2))
    held = {"bob": Holding(cores=2, leases=2), "carol": Holding(cores=2, leases=2)}
    full = snapshot(node("a", free=0), held=held, preemptible=leases)
    decision = decide(PHYSICS, full, demand("physics", count=2, together=True))
    assert {lease[:-1] for lease in decision.evict} == {"bob", "carol"}


def test_nobody_is_pushed_from_a_node_that_rules_close_to_the_request() -> None:
    policies = load_policies(
        "[tenants.physics]\nguarantee = { cores = 4 }\n"
        "[[rule]]\nname = 'not a'\nthen = 'deny'\nwhen = 'node.name == \"a\"'\n"
    )
    leases = (lease_of("bob", "l0"), lease_of("bob", "l1", on="b"))
    held = {"bob": Holding(cores=8, leases=2)}
    full = snapshot(node("a", free=0), node("b", free=0), held=held, preemptible=leases)
    assert decide(policies, full, demand("physics")).evict == ("l1",)


def test_core_hours_are_limited_by_quota_and_by_rules() -> None:
    policies = load_policies("[[rule]]\nname = 'day'\nthen = 'cap'\ncore_hours = 10\nwindow_h = 24\n")
    assert policies.windows_h == {24}
    site = snapshot(node("a"))
    spent = _with_spent(site, {24: 10.5, 168: 30.0})
    decision = decide(policies, spent, demand())
    assert (decision.outcome, decision.blocked_by) == ("wait", "quota")
    assert decision.reason.startswith("rule 'day', per tenant may use 10 core-hours in 24 h and used 10.5")
    assert decide(policies, _with_spent(site, {24: 9.9}), demand()).outcome == "grant"
    weekly = demand(quota=Quota(core_hours=20, window_h=168))
    assert "used 30.0" in decide(load_policies(""), spent, weekly).reason


def _with_spent(site: Snapshot, spent: dict[int, float]) -> Snapshot:
    return Snapshot(
        nodes=site.nodes, tenants=site.tenants, pools=site.pools, clock_s=site.clock_s, spent_core_h=spent
    )


@given(
    st.lists(st.tuples(st.sampled_from(["bob", "carol"]), st.integers(1, 4), st.integers(0, 1)), max_size=8),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_who_is_pushed_out_makes_room_and_nobody_falls_below_its_guarantee(
    held: list[tuple[str, int, int]], cores: int, count: int
) -> None:
    policies = load_policies(
        "[tenants.physics]\nguarantee = { cores = 16 }\n[tenants.carol]\nguarantee = { cores = 3 }\n"
    )
    leases = tuple(
        lease_of(tenant, f"l{i}", on="ab"[on], cores=size) for i, (tenant, size, on) in enumerate(held)
    )
    totals = {
        name: Holding(
            cores=sum(one.cores for one in leases if one.tenant == name),
            memory_bytes=sum(one.memory_bytes for one in leases if one.tenant == name),
            leases=sum(one.tenant == name for one in leases),
        )
        for name in ("bob", "carol")
    }
    full = snapshot(node("a", free=0, cores=32), node("b", free=0, cores=32), held=totals, preemptible=leases)
    decision = decide(policies, full, demand("physics", cores=cores, count=count, together=True))
    gone = [one for one in leases if one.lease in decision.evict]
    carol_keeps = totals["carol"].cores - sum(one.cores for one in gone if one.tenant == TenantId("carol"))
    assert carol_keeps >= min(3, totals["carol"].cores)
    if gone:
        room = sum(sum(one.cores for one in gone if one.node == name) // cores for name in ("a", "b"))
        assert room >= count
