"""Fair share: dominant resource fairness, its theorems, and what tenants used before."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from isthmus.core.ids import NodeId, TenantId
from isthmus.core.model import Resources
from isthmus.policy import PolicySet, Snapshot, decide, fairness, load_policies
from isthmus.policy.snapshot import Holding, NodeRow, NodeTable, Pool, Used
from tests.unit.policy.situations import GIB, THURSDAY_NOON_S, demand, node, snapshot

CORES, MEMORY_GIB = 90, 180
HALF_LIFE_H = 2.0
AT_ONCE = load_policies("[fair]\nhalf_life_h = 0\n")  # only what is held now counts: DRF as published
ALICE, BOB = TenantId("alice"), TenantId("bob")


class Site:
    """One large node that is filled lease by lease: whoever stands lowest and still fits gets the next."""

    def __init__(self, policies: PolicySet, tasks: dict[str, Resources]) -> None:
        self.policies = policies
        self.tasks = {TenantId(name): resources for name, resources in tasks.items()}
        self.held = dict.fromkeys(self.tasks, Holding())
        everything = NodeRow(
            node=NodeId("n"),
            platform="local",
            cores=CORES,
            memory_bytes=MEMORY_GIB * GIB,
            gpus=0,
            free_cores=CORES,
            free_memory_bytes=MEMORY_GIB * GIB,
            free_gpus=0,
        )
        self.nodes = NodeTable([everything])
        while self.serve_next():
            pass

    def serve_next(self) -> bool:
        now = self.snapshot()
        for standing in fairness.standings(self.policies, now, self.tasks):
            if self.fits(standing.tenant):
                self.take(standing.tenant)
                return True
        return False

    def snapshot(self) -> Snapshot:
        pools = {"default": Pool(maximum=10**6)}
        return Snapshot(nodes=self.nodes, tenants=self.held, pools=pools, clock_s=THURSDAY_NOON_S)

    def fits(self, tenant: TenantId) -> bool:
        task = self.tasks[tenant]
        wanted = demand(tenant=tenant)
        lease = type(wanted.lease)(resources=task)
        asked = type(wanted)(request=wanted.request, tenant=tenant, lease=lease)
        return decide(self.policies, self.snapshot(), asked).outcome == "grant"

    def take(self, tenant: TenantId) -> None:
        task, held = self.tasks[tenant], self.held[tenant]
        self.nodes.take(NodeId("n"), task)
        self.held[tenant] = Holding(
            cores=held.cores + task.cores,
            memory_bytes=held.memory_bytes + task.memory_bytes,
            leases=held.leases + 1,
        )

    def share(self, tenant: str) -> float:
        return fairness.standing(self.policies, self.snapshot(), TenantId(tenant)).held

    def task_share(self, tenant: str) -> float:
        """The largest share of anything that one task takes."""
        task = self.tasks[TenantId(tenant)]
        return max(task.cores / CORES, task.memory_bytes / (MEMORY_GIB * GIB))

    def count(self, tenant: str) -> int:
        return self.held[TenantId(tenant)].leases


def task(cores: int, memory_gib: int) -> Resources:
    return Resources(cores=cores, memory=memory_gib * GIB)


tasks = st.builds(task, st.integers(1, 9), st.integers(1, 18))
sites = st.lists(tasks, min_size=2, max_size=4).map(lambda all_: {f"t{i}": one for i, one in enumerate(all_)})


def test_the_example_of_the_paper_comes_out_as_published() -> None:
    """9 CPUs and 18 GB, tasks of <1 CPU, 4 GB> and <3 CPUs, 1 GB>: three tasks and two, two thirds each."""
    site = Site(AT_ONCE, {"a": task(10, 40), "b": task(30, 10)})
    assert (site.count("a"), site.count("b")) == (3, 2)
    assert site.share("a") == pytest.approx(site.share("b")) == pytest.approx(2 / 3)


@settings(max_examples=40)
@given(sites)
def test_nothing_stays_free_that_somebody_could_use(wanted: dict[str, Resources]) -> None:
    site = Site(AT_ONCE, wanted)
    assert not any(site.fits(tenant) for tenant in site.tasks)


@settings(max_examples=40)
@given(sites)
def test_nobody_would_rather_have_its_nth_of_the_site(wanted: dict[str, Resources]) -> None:
    """Sharing incentive, up to the one task of each that may be under way."""
    site = Site(AT_ONCE, wanted)
    granularity = sum(site.task_share(tenant) for tenant in wanted)
    for tenant in wanted:
        assert site.share(tenant) >= (1 - granularity) / len(wanted) - 1e-9


@settings(max_examples=60)
@given(sites, tasks)
@example({"t0": task(1, 4), "t1": task(3, 1)}, task(3, 4))
def test_nobody_gains_by_asking_for_other_than_it_needs(wanted: dict[str, Resources], lie: Resources) -> None:
    """Strategy-proofness, up to the one task of each that may be under way."""
    honest, liar = Site(AT_ONCE, wanted), Site(AT_ONCE, {**wanted, "t0": lie})
    need, got = wanted["t0"], liar.held[TenantId("t0")]
    useful = min(got.cores // need.cores, got.memory_bytes // need.memory_bytes)
    granularity = sum(honest.task_share(tenant) for tenant in wanted) + liar.task_share("t0")
    assert useful * honest.task_share("t0") <= honest.share("t0") + granularity


@settings(max_examples=30)
@given(tasks, st.integers(1, 4))
def test_a_tenant_of_twice_the_weight_gets_twice_the_share(one: Resources, weight: int) -> None:
    policies = load_policies(f"[fair]\nhalf_life_h = 0\n[tenants.heavy]\nweight = {weight}\n")
    site = Site(policies, {"heavy": one, "light": one})
    assert abs(site.share("heavy") / weight - site.share("light")) <= site.task_share("light") + 1e-9


def test_who_was_idle_stands_below_who_was_not_and_that_is_forgotten_with_time() -> None:
    policies = load_policies(f"[fair]\nhalf_life_h = {HALF_LIFE_H}\n")
    used = {BOB: Used(core_s=4 * 3600.0, at_s=THURSDAY_NOON_S)}
    now = Snapshot(nodes=NodeTable([node("a")]), tenants={}, pools={}, clock_s=THURSDAY_NOON_S, used=used)
    later = Snapshot(
        nodes=now.nodes,
        tenants={},
        pools={},
        clock_s=THURSDAY_NOON_S + 2 * HALF_LIFE_H * 3600,
        used=used,
    )
    assert [one.tenant for one in fairness.standings(policies, now, (BOB, ALICE))] == [ALICE, BOB]
    level = fairness.standing(policies, now, BOB).level
    assert fairness.standing(policies, later, BOB).level == pytest.approx(level / 4)
    assert fairness.standing(AT_ONCE, now, BOB).level == 0


def test_who_holds_the_same_all_the_time_has_used_on_average_what_it_holds() -> None:
    policies = load_policies(f"[fair]\nhalf_life_h = {HALF_LIFE_H}\n")
    used = Used()
    for minute in range(60 * 24 * 2):
        used = fairness.spend(used, Used(core_s=60.0, at_s=minute * 60.0), policies.fair.half_life_s)
    now = Snapshot(
        nodes=NodeTable([node("a", cores=4)]),
        tenants={BOB: Holding(cores=1, leases=1)},
        pools={},
        clock_s=used.at_s,
        used={BOB: used},
    )
    standing = fairness.standing(policies, now, BOB)
    assert (standing.dominant, standing.held) == ("cores", 0.25)
    assert standing.used == pytest.approx(0.25, rel=0.01)


def test_a_decision_tells_where_the_tenant_stands_and_who_waits() -> None:
    from isthmus.policy import in_words

    policies = load_policies("[tenants.bob]\nweight = 2.0\npriority = 3\n")
    now = Snapshot(
        nodes=NodeTable([node("a", free=0)]),
        tenants={ALICE: Holding(cores=3, leases=1), BOB: Holding(cores=1, leases=1)},
        pools={"default": Pool()},
        clock_s=THURSDAY_NOON_S,
        waiting=(ALICE, BOB),
    )
    decision = decide(policies, now, demand(tenant="bob"))
    assert decision.priority == 3
    words = "\n".join(in_words(demand(tenant="bob"), decision))
    assert "Fair share: bob holds 25.00% of the site's cores, weight 2: level 0.1250, priority +3" in words
    assert "after it waits alice holds 75.00% of the site's cores: level 0.7500" in words


def test_a_rule_can_hurry_a_request_and_read_where_its_tenant_stands() -> None:
    rule = "[[rule]]\nname = 'u'\nthen = 'hurry'\nby = 7\nwhen = 'tenant.level < 0.5 && clock.hour == 12'\n"
    policies = load_policies(rule)
    assert decide(policies, snapshot(node("a")), demand()).priority == 7
    high = snapshot(node("a"), held={"alice": Holding(cores=2, leases=1)})
    assert decide(policies, high, demand()).priority == 0
