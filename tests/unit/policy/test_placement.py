"""The index over nodes gives what a look at every node would give."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.ids import NodeId
from isthmus.core.model import LeaseClass, Resources
from isthmus.policy import ALLOW_ALL, decide, placement
from isthmus.policy.placement import GPU_WASTE, Ranking
from isthmus.policy.snapshot import NodeTable
from tests.unit.policy.situations import demand, node, snapshot

rows = st.lists(
    st.tuples(
        st.integers(0, 4), st.sampled_from([4, 8]), st.integers(0, 1), st.booleans(), st.integers(0, 2)
    ),
    min_size=1,
    max_size=60,
)
bookings = st.lists(st.tuples(st.integers(0, 59), st.integers(1, 2), st.sampled_from([1, -1])), max_size=40)


def _table(shown: list[tuple[int, int, int, bool, int]]) -> NodeTable:
    return NodeTable(
        [
            node(f"n{i}", free=free, cores=cores, gpus=gpus, is_open=is_open, zone=f"z{zone}")
            for i, (free, cores, gpus, is_open, zone) in enumerate(shown)
        ]
    )


def _book(table: NodeTable, booked: list[tuple[int, int, int]]) -> None:
    for row, cores, sign in booked:
        table.take(NodeId(f"n{row}"), Resources(cores=cores), sign)


def test_an_elastic_lease_goes_where_an_agent_stands_ready_and_a_reserved_one_does_not() -> None:
    rows = node("n1", free=3), node("n1.burst.7", free=1, platform="pool"), node("n2", free=1)
    elastic, reserved = demand(lease_class=LeaseClass.ELASTIC), demand(lease_class=LeaseClass.RESERVED)
    assert decide(ALLOW_ALL, snapshot(*rows), elastic).places == ("n1.burst.7",)
    assert decide(ALLOW_ALL, snapshot(*rows), reserved).places == ("n2",)
    assert placement.hosts(NodeTable(rows), LeaseClass.ELASTIC, Resources(licenses={"a": 1})).tolist() == [
        True, False, True,
    ]  # fmt: skip
    assert snapshot(*rows).nodes.total.cores == 8, "a pool's allocation is part of another node"


@given(rows, bookings)
def test_shelves_say_what_the_columns_say(
    shown: list[tuple[int, int, int, bool, int]], booked: list[tuple[int, int, int]]
) -> None:
    table = _table(shown)
    _book(table, booked)
    shelves = table.shelves
    assert shelves.free_cores[shelves.of_node].tolist() == table.free_cores.tolist()
    assert shelves.shape[shelves.of_node].tolist() == table.shape.tolist()
    keys = zip(table.shape.tolist(), table.free_cores.tolist(), strict=True)
    assert len(set(shelves.of_node.tolist())) == len(set(keys))


@given(rows, bookings, st.integers(1, 3), st.lists(st.sampled_from([0.0, 1.0, -np.inf]), min_size=40))
def test_nodes_come_in_order_of_their_score_and_then_of_the_table(
    shown: list[tuple[int, int, int, bool, int]],
    booked: list[tuple[int, int, int]],
    cores: int,
    bonus_by_shape: list[float],
) -> None:
    table = _table(shown)
    _book(table, booked)
    resources = Resources(cores=cores)
    fitting = placement.fits(table, resources)
    ranking = Ranking(table, fitting, resources)
    bonus = np.array(bonus_by_shape)
    order = ranking.scores + bonus[ranking.shapes]
    found = [row for row, _ in ranking.ordered(order)] if ranking.count else []

    def score(row: int) -> float:
        packed = 1.0 - (int(table.free_cores[row]) - cores) / int(table.cores[row])
        return packed - GPU_WASTE * bool(table.gpus[row]) + bonus_by_shape[int(table.shape[row])]

    expected = sorted(np.flatnonzero(fitting).tolist(), key=lambda row: (-score(row), row))
    assert found == expected
    assert ranking.count == len(expected)


def test_many_shelves_are_sorted_only_as_far_as_somebody_looks() -> None:
    table = NodeTable([node(f"n{i}", free=i + 1, cores=500) for i in range(400)])
    resources = Resources(cores=1)
    ranking = Ranking(table, placement.fits(table, resources), resources)
    some = [row for row, _ in itertools.islice(ranking.ordered(ranking.scores), 100)]
    assert some == list(range(100))
