"""What runs, freezes and leaves, by what the owner leaves idle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.ids import LeaseId
from isthmus.node.slack import (
    CALM_NS,
    NO_CEILING,
    STALLED_MAX,
    Guest,
    Progress,
    Slack,
    Starving,
    Verdict,
    judge,
    memory_ceiling,
    slack,
)

GIB = 2**30
S = 10**9
A, B = LeaseId("ls_a"), LeaseId("ls_b")


def guest(lease: LeaseId, cores: int = 1, memory_bytes: int = GIB, frozen_ns: int = 0) -> Guest:
    return Guest(lease, cores, memory_bytes, frozen_ns)


@pytest.mark.parametrize(
    ("used", "idle"), [(0.0, 4), (0.1, 4), (0.9, 3), (1.0, 3), (3.5, 1), (3.9, 0), (4.0, 0), (4.7, 0)]
)
def test_a_core_counts_as_idle_from_a_fifth_on(used: float, idle: int) -> None:
    assert slack(4, 8 * GIB, 8 * GIB, used, 0).cores == idle


def test_a_tenth_of_the_memory_is_left_to_the_owner_and_no_more_than_is_lent_is_given() -> None:
    assert slack(4, 100 * GIB, 100 * GIB, 0.0, 50 * GIB).memory_bytes == 40 * GIB
    assert slack(4, 10 * GIB, 100 * GIB, 0.0, 50 * GIB).memory_bytes == 10 * GIB
    assert slack(4, 100 * GIB, 100 * GIB, 0.0, 95 * GIB).memory_bytes < 0


def test_where_there_is_room_nothing_changes() -> None:
    assert judge([guest(A), guest(B)], Slack(2, 8 * GIB), S, S) == Verdict()


def test_who_came_last_freezes_first() -> None:
    assert judge([guest(A), guest(B)], Slack(1, 8 * GIB), S, S) == Verdict(freeze=(B,))


def test_what_fits_again_is_thawed() -> None:
    assert judge([guest(A, frozen_ns=1)], Slack(1, 8 * GIB), 9 * S, S) == Verdict(thaw=(A,))


def test_who_lies_frozen_for_too_long_leaves() -> None:
    frozen = [guest(A, frozen_ns=5 * S)]
    assert judge(frozen, Slack(0, 8 * GIB), 6 * S, 2 * S) == Verdict()
    assert judge(frozen, Slack(0, 8 * GIB), 7 * S, 2 * S) == Verdict(evict=(A,))


def test_memory_that_the_owner_needs_is_given_back_at_once_by_who_came_last() -> None:
    assert judge([guest(A), guest(B)], Slack(2, GIB), S, S) == Verdict(evict=(B,))


GUESTS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(0, 9)), max_size=8).map(
    lambda rows: [guest(LeaseId(f"ls_{i}"), c, m * GIB, f * S) for i, (c, m, f) in enumerate(rows)]
)


@given(GUESTS, st.integers(0, 8), st.integers(-4, 16))
def test_what_runs_afterwards_fits_the_slack(guests: list[Guest], cores: int, memory: int) -> None:
    verdict = judge(guests, Slack(cores, memory * GIB), 10 * S, 2 * S)
    left = [one for one in guests if one.lease not in verdict.evict]
    running = [one for one in left if (not one.frozen_ns or one.lease in verdict.thaw)]
    running = [one for one in running if one.lease not in verdict.freeze]
    assert sum(one.cores for one in running) <= cores
    assert sum(one.memory_bytes for one in left) <= max(memory, 0) * GIB
    assert not set(verdict.freeze) & set(verdict.thaw)
    assert not set(verdict.evict) & (set(verdict.freeze) | set(verdict.thaw))


def test_while_somebody_waits_for_memory_half_of_what_is_harvested_goes_and_then_nothing_comes() -> None:
    assert memory_ceiling(4 * GIB, 2 * STALLED_MAX, 0, NO_CEILING) == 2 * GIB
    assert memory_ceiling(GIB, STALLED_MAX, CALM_NS - 1, 2 * GIB) == GIB
    assert memory_ceiling(2 * GIB, STALLED_MAX, CALM_NS - 1, GIB) == GIB, "what grew lifts it not"
    assert memory_ceiling(2 * GIB, STALLED_MAX, CALM_NS, GIB) == NO_CEILING


def test_a_share_of_a_core_that_counts_as_idle_is_no_starving() -> None:
    starving = Starving()
    for _ in range(4):
        assert starving.look([Progress(A, True, 0.2)]) == []


def test_only_who_wants_to_run_and_gets_nothing_twice_is_starved() -> None:
    starving = Starving()
    assert starving.look([Progress(A, True, 0.0), Progress(B, False, 0.0)]) == []
    assert starving.look([Progress(A, True, 0.05), Progress(B, False, 0.0)]) == [A]
    assert starving.look([Progress(A, True, 0.0)]) == []


def test_a_little_progress_between_is_no_starving() -> None:
    starving = Starving()
    for share in (0.0, 0.5, 0.0, 0.9):
        assert starving.look([Progress(A, True, share)]) == []
