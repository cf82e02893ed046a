"""Group calls through a real embedded site."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

import isthmus
from tests.live import sdk_functions as remote

SIZE = min(2, len(os.sched_getaffinity(0)))


@pytest.fixture(scope="module")
def site() -> Iterator[isthmus.Site]:
    with isthmus.connect() as opened:
        yield opened


def test_members_know_their_ranks_and_work_together(site):
    results = site.group(remote.sum_of_ranks, size=SIZE)(np.ones(1000))
    assert [rank for rank, _ in results] == list(range(SIZE))
    assert all(total == SIZE * 1000 for _, total in results)


def test_a_failing_member_ends_the_group_with_its_exception(site):
    with pytest.raises(ValueError, match="rank 0"):
        site.group(remote.fail_at_first_rank, size=SIZE)()


def test_a_group_gives_its_cores_back(site):
    for _ in range(3):
        assert len(site.group(remote.sum_of_ranks, size=SIZE)(np.ones(10))) == SIZE
    assert site.call(remote.square, 3) == 9


def test_a_group_that_can_never_start_is_refused_at_once(site):
    size = 2 * len(os.sched_getaffinity(0)) + 1
    with pytest.raises(isthmus.DeniedError, match="all nodes together hold"):
        site.group(remote.sum_of_ranks, size=size)(np.ones(10))
