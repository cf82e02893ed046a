"""When an owner has its cores back, told from spans of time in which something ran."""

from benchmarks.harness.reclaims import WINDOW_NS, full_speed_ms, linger_ms, ran_ns, reclaim_ms, resume_ms

MS = 1_000_000
DUE, DONE = 1000 * MS, 1600 * MS


def span(since_ms: float, until_ms: float) -> tuple[int, int]:
    return DUE + int(since_ms * MS), DUE + int(until_ms * MS)


def test_cores_that_nobody_harvests_are_back_at_once() -> None:
    assert reclaim_ms([], DUE, DONE, 2) == 0.0
    assert reclaim_ms([span(-50, -1), span(700, 900)], DUE, DONE, 2) == 0.0


def test_code_that_runs_on_holds_its_core_until_it_stops() -> None:
    assert reclaim_ms([span(-50, 30)], DUE, DONE, 2) == 30.0


def test_a_core_that_never_comes_back_counts_until_the_owner_sleeps() -> None:
    assert reclaim_ms([span(-50, 700)], DUE, DONE, 2) == 600.0


def test_a_slice_now_and_then_is_no_held_core_but_lingers() -> None:
    slices = [span(100, 101), span(350, 351)]
    assert reclaim_ms(slices, DUE, DONE, 2) == 0.0
    assert linger_ms(slices, DUE, DONE) == 351.0


def test_slices_that_take_more_than_a_twentieth_hold_the_cores() -> None:
    slices = [span(start, start + 5) for start in range(0, 100, 10)]
    assert reclaim_ms(slices, DUE, DONE, 2) == 95.0


def test_a_thread_that_wakes_late_is_not_at_full_speed_before() -> None:
    assert full_speed_ms([], DUE, DUE + 4 * MS, DONE) == 4.0
    assert full_speed_ms([], DUE, DUE + MS // 2, DONE) == 0.0


def test_full_speed_begins_after_the_last_gap_that_matters() -> None:
    gaps = [span(5, 12), span(20, 28), span(300, 300.5)]
    assert full_speed_ms(gaps, DUE, DUE, DONE) == 28.0


def test_a_pause_is_used_from_the_first_harvested_instruction_in_it() -> None:
    assert resume_ms([span(0, 5), span(630, 900)], DONE, DUE + 1000 * MS) == 30.0
    assert resume_ms([span(590, 900)], DONE, DUE + 1000 * MS) == 0.0
    assert resume_ms([], DONE, DUE + 1000 * MS) == 400.0


def test_only_what_lies_within_is_counted() -> None:
    assert ran_ns([span(-10, 10), span(WINDOW_NS / MS - 5, 900)], DUE, DUE + WINDOW_NS) == 15 * MS
