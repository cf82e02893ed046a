"""Cores and memory of a node are given out once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.errors import NoCapacityError
from isthmus.core.ids import LeaseId
from isthmus.core.model import Resources
from isthmus.node.isolation import Share
from isthmus.node.leases import Allotments, Capacity, end_ns

GIB = 2**30
CAPACITY = Capacity(cores=(2, 3, 5, 8), memory_bytes=8 * GIB, gpus=1)


def test_bandwidth_is_given_until_none_is_left() -> None:
    allotments = Allotments(Capacity((0, 1, 2), 8 * GIB, amounts={"bandwidth": 10**9}))
    share = allotments.take(LeaseId("a"), Resources(memory="1GiB", bandwidth="600Mbit/s"))
    assert share.amounts == (("bandwidth", 6 * 10**8),)
    with pytest.raises(NoCapacityError, match=r"needs 600 Mbit/s of bandwidth, 400 Mbit/s are free here"):
        allotments.take(LeaseId("b"), Resources(memory="1GiB", bandwidth="600Mbit/s"))
    assert allotments.take(LeaseId("b"), Resources(memory="1GiB", licenses={"matlab": 9})).amounts == ()


def test_the_same_lease_gets_the_same_share() -> None:
    allotments = Allotments(CAPACITY)
    first = allotments.take(LeaseId("a"), Resources(cores=2, memory="1GiB"))
    assert first == allotments.take(LeaseId("a"), Resources(cores=2, memory="1GiB")) == Share((2, 3), GIB)


@pytest.mark.parametrize(
    ("resources", "complaint"),
    [
        (Resources(cores=5), "5 cores, 4 of 4"),
        (Resources(memory="9GiB"), "9.0 GiB of memory, 8.0 GiB of 8.0 GiB"),
        (Resources(gpus=2), "2 GPUs, this node has 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(resources: Resources, complaint: str) -> None:
    with pytest.raises(NoCapacityError, match=complaint):
        Allotments(CAPACITY).take(LeaseId("a"), resources)


def test_what_is_given_back_can_be_taken_again() -> None:
    allotments = Allotments(CAPACITY)
    allotments.take(LeaseId("a"), Resources(cores=4, memory="8GiB"))
    allotments.give_back(LeaseId("a"))
    allotments.give_back(LeaseId("never there"))
    assert allotments.take(LeaseId("b"), Resources(cores=4)).cores == CAPACITY.cores


def test_lent_cores_are_shared_by_as_many_leases_as_there_are_cores() -> None:
    allotments = Allotments(Capacity(cores=(0, 1, 2, 3), memory_bytes=8 * GIB, lent_cores=2))
    for name in ("a", "b"):
        share = allotments.take(LeaseId(name), Resources())
        assert share == Share((0, 1, 2, 3), GIB, idle_cores=1)
    with pytest.raises(NoCapacityError, match="1 cores, 0 of 2"):
        allotments.take(LeaseId("c"), Resources())
    allotments.give_back(LeaseId("a"))
    allotments.take(LeaseId("c"), Resources())


def test_an_adopted_lease_keeps_its_cores() -> None:
    allotments = Allotments(CAPACITY)
    allotments.restore(LeaseId("old"), Share((3, 5), GIB))
    assert allotments.take(LeaseId("new"), Resources(cores=2)).cores == (2, 8)
    assert allotments.free_memory_bytes() == 6 * GIB


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.booleans()), max_size=40))
def test_no_core_is_ever_in_two_leases(steps: list[tuple[int, int, bool]]) -> None:
    allotments = Allotments(CAPACITY)
    held: dict[str, Share] = {}
    for number, cores, gives_back in steps:
        name = LeaseId(f"l{number}")
        if gives_back:
            allotments.give_back(name)
            held.pop(name, None)
            continue
        try:
            held[name] = allotments.take(name, Resources(cores=cores))
        except NoCapacityError:
            assert cores > len(allotments.free_cores())
    used = [core for share in held.values() for core in share.cores]
    assert sorted([*used, *allotments.free_cores()]) == list(CAPACITY.cores)


@pytest.mark.parametrize(
    ("clients", "connected", "ends_at"), [(0, True, 10), (1, True, 10), (0, False, 10), (1, False, 15)]
)
def test_only_a_lease_in_use_outlives_its_deadline_and_only_without_the_site(
    clients: int, connected: bool, ends_at: int
) -> None:
    assert end_ns(10, 5, clients, connected) == ends_at
