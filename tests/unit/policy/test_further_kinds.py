"""Bandwidth of nodes: placed, packed, pushed out and replayed like cores."""

import msgspec
import pytest

from isthmus.core.ids import NodeId, TenantId
from isthmus.core.model import LeaseClass, Quota, Resources
from isthmus.policy import Demand, Snapshot, decide, fairness, load_policies
from isthmus.policy.rules import ALLOW_ALL, PolicySet
from isthmus.policy.snapshot import Holding, NodeRow, Preemptible, from_record
from tests.unit.policy.situations import demand, elastic, node, snapshot

GBIT = 10**9
ALICE = TenantId("alice")


def wired(name: str, free: float = 10, there: float = 10, **more: object) -> NodeRow:
    """A node with bandwidth, in Gbit/s."""
    plain = node(name, **more)  # type: ignore[arg-type]
    amounts = {"bandwidth": int(there * GBIT)}
    return msgspec.structs.replace(plain, amounts=amounts, free_amounts={"bandwidth": int(free * GBIT)})


def asks(bandwidth: str | int, **more: object) -> Demand:
    plain = demand(**more)  # type: ignore[arg-type]
    resources = Resources(bandwidth=bandwidth)
    return msgspec.structs.replace(plain, lease=msgspec.structs.replace(plain.lease, resources=resources))


def verdict(situation: Snapshot, asked: Demand, policies: PolicySet = ALLOW_ALL):
    decision = decide(policies, situation, asked)
    record = msgspec.msgpack.decode(msgspec.msgpack.encode(situation.record()), type=type(situation.record()))
    assert decide(policies, from_record(record), asked) == decision
    return decision


def test_a_lease_goes_where_its_bandwidth_is_free() -> None:
    situation = snapshot(node("none"), wired("busy", free=1), wired("calm", free=5))
    assert verdict(situation, asks("2Gbit/s")).places == ("calm",)
    assert verdict(situation, asks("500Mbit/s", count=3)).nodes_fitting == 2
    assert verdict(situation, demand()).nodes_fitting == 3


def test_a_node_takes_as_many_leases_as_its_bandwidth_is_enough_for() -> None:
    decision = verdict(snapshot(wired("n", free=5)), asks("2Gbit/s", count=4))
    assert decision.places == ("n", "n")


def test_what_is_not_free_now_waits_and_what_no_node_has_is_denied() -> None:
    busy = snapshot(wired("n", free=1))
    waiting = verdict(busy, asks("2Gbit/s"))
    assert (waiting.outcome, waiting.blocked_by) == ("wait", "capacity")
    assert "2 Gbit/s of bandwidth now" in waiting.reason
    assert verdict(busy, asks("12Gbit/s")).reason == (
        "no node has 12 Gbit/s of bandwidth (most: 10 Gbit/s on n)"
    )
    assert verdict(snapshot(node("n")), asks("1kbit/s")).reason == (
        "no node has 1 kbit/s of bandwidth (none has any to lease: set node.bandwidth)"
    )
    together = verdict(snapshot(wired("n")), asks("4Gbit/s", count=3, together=True))
    assert together.reason == "3 leases at once: all nodes together hold 2 such"


def test_what_is_booked_on_a_table_is_not_free_until_it_is_given_back() -> None:
    situation = snapshot(wired("n"), node("none"))
    for sign in (1, -1):
        situation.nodes.take(NodeId("n"), Resources(bandwidth="9Gbit/s"), sign)
        situation.nodes.take(NodeId("none"), Resources(bandwidth="9Gbit/s"), sign)  # a node that lost it
        assert verdict(situation, asks("2Gbit/s")).outcome == ("wait" if sign == 1 else "grant")


def test_idle_leases_go_for_the_bandwidth_they_hold() -> None:
    def holder(name: str, gbit: int, on: str = "n") -> Preemptible:
        lease = elastic(name, on, idle=True)
        return msgspec.structs.replace(lease, amounts={"bandwidth": gbit * GBIT})

    idle = (holder("small", 1), holder("large", 8))
    situation = snapshot(wired("n", free=1), preemptible=idle)
    assert verdict(situation, asks("8Gbit/s")).evict == ("large",)
    assert verdict(situation, asks("10Gbit/s")).evict == ("large", "small")


def test_bandwidth_is_limited_shared_and_seen_by_rules() -> None:
    held = {"alice": Holding(cores=1, leases=1, amounts={"bandwidth": 15 * GBIT})}
    situation = snapshot(wired("a"), wired("b"), held=held)
    decision = verdict(situation, asks("5Gbit/s", quota=Quota(bandwidth="16Gbit/s")))
    assert decision.reason == (
        "tenant alice may hold 16 Gbit/s of bandwidth and holds 15 Gbit/s; each lease needs 5 Gbit/s more"
    )
    standing = fairness.standing(ALLOW_ALL, situation, ALICE)
    assert (standing.dominant, standing.held) == ("bandwidth", 0.75)
    rules = load_policies(
        "[[rule]]\nname = 'fat'\nthen = 'deny'\n"
        "when = 'request.bandwidth > 1000000000 && node.free_bandwidth < 2 * request.bandwidth'\n"
        "[[rule]]\nname = 'most'\nthen = 'cap'\nbandwidth = '16Gbit/s'\nwhen = 'tenant.bandwidth > 0'\n"
    )
    assert verdict(situation, asks("6Gbit/s"), rules).outcome == "wait"  # the cap
    assert verdict(snapshot(wired("a")), asks("6Gbit/s"), rules).blocked_by == "rule"
    assert verdict(snapshot(wired("a")), asks("4Gbit/s"), rules).outcome == "grant"


@pytest.mark.parametrize("wrong", ["fast", "2Gb", "-1bit/s", -5, "1e30bit/s", "2000Tbit/s"])
def test_a_rate_that_makes_no_sense_is_refused(wrong: str | int) -> None:
    with pytest.raises(ValueError):
        Resources(bandwidth=wrong)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"bandwidth": wrong}, Resources)


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("2Gbit/s", 2 * GBIT),
        ("500 Mbit/s", GBIT // 2),
        ("1.5kbit/s", 1500),
        ("125MB/s", GBIT),
        (7, 7),
        ("9", 9),
    ],
)
def test_a_rate_may_be_written_in_bits_or_bytes(text: str | int, bits_per_s: int) -> None:
    assert Resources(bandwidth=text).amounts == {"bandwidth": bits_per_s}


def test_harvested_leases_find_no_bandwidth_on_lent_nodes() -> None:
    lent = node("lent", platform="lent")
    decision = verdict(snapshot(lent, wired("n")), asks("1Gbit/s", lease_class=LeaseClass.HARVESTED))
    assert decision.outcome == "wait"


def test_a_guarantee_of_bandwidth_comes_back_from_those_who_borrow_it() -> None:
    guaranteed = load_policies(
        "[tenants.alice]\nguarantee = { cores = 2, memory = '4GiB', bandwidth = '5Gbit/s' }\n"
    )
    lease = msgspec.structs.replace(
        elastic("b", "n"), tenant=TenantId("bob"), amounts={"bandwidth": 10 * GBIT}
    )
    held = {"bob": Holding(cores=1, leases=1, amounts={"bandwidth": 10 * GBIT})}
    full = snapshot(wired("n", free=0), held=held, preemptible=(lease,))
    assert verdict(full, asks("5Gbit/s"), guaranteed).evict == ("b",)
    assert verdict(full, asks("6Gbit/s"), guaranteed).evict == ()
    hoarding = load_policies("[tenants.alice]\nlend = false\nguarantee = { bandwidth = '5Gbit/s' }\n")
    decision = verdict(snapshot(wired("n")), asks("6Gbit/s", tenant="bob"), hoarding)
    assert decision.reason == "what is free is guaranteed to alice (5 Gbit/s of bandwidth)"
