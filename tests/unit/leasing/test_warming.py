"""Spares that a pool keeps warm."""

from isthmus.core.ids import NodeId
from isthmus.core.model import Environment
from isthmus.core.settings import PoolSettings
from isthmus.leasing.warming import ENVIRONMENTS_MAX, Warming

A, B = NodeId("a"), NodeId("b")


def _spares(due: list) -> list[tuple[str, int]]:
    return sorted((node, warm.spares) for node, warm in due)


def test_a_minimum_is_spread_over_the_nodes_and_told_once() -> None:
    warming = Warming({"default": PoolSettings(minimum=3), "other": PoolSettings()})
    assert _spares(warming.due([A, B])) == [("a", 2), ("b", 1)]
    assert warming.due([A, B]) == []


def test_a_node_that_leaves_hands_its_share_to_the_others() -> None:
    warming = Warming({"default": PoolSettings(minimum=3)})
    warming.due([A, B])
    assert _spares(warming.due([A])) == [("a", 3)]


def test_a_new_agent_is_told_anew() -> None:
    warming = Warming({"default": PoolSettings(minimum=1)})
    warming.due([A])
    warming.forget(A)
    assert _spares(warming.due([A])) == [("a", 1)]


def test_only_the_latest_environments_stay_warm() -> None:
    warming = Warming({"default": PoolSettings(minimum=1)})
    warming.due([A])
    for number in range(ENVIRONMENTS_MAX):
        warming.used("default", Environment(preload=(f"m{number}",)))
    due = warming.due([A])
    assert [warm.spares for _, warm in due if warm.environment == Environment()] == [0]
    assert sum(warm.spares for _, warm in due) == ENVIRONMENTS_MAX
    assert warming.due([A]) == []


def test_a_pool_that_scales_to_zero_orders_nothing() -> None:
    warming = Warming({"default": PoolSettings()})
    warming.used("default", Environment(preload=("numpy",)))
    assert warming.due([A]) == []
