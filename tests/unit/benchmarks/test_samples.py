import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.samples import percentile, summarise, unit_of

SAMPLES = st.lists(st.floats(0, 1e9, allow_nan=False), min_size=1, max_size=200)


def test_a_percentile_is_the_smallest_sample_that_so_many_do_not_exceed():
    ordered = list(range(1, 1001))
    assert [percentile(ordered, percent) for percent in (50, 99, 99.9, 100)] == [500, 990, 999, 1000]


def test_a_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


@given(SAMPLES, st.floats(0.1, 100))
def test_every_percentile_is_a_sample_that_was_seen(samples, percent):
    assert percentile(sorted(samples), percent) in samples


@given(st.lists(SAMPLES, min_size=1, max_size=5))
def test_a_summary_orders_its_statistics_and_counts_all_rounds(rounds):
    summary = summarise("call_us", rounds)
    assert summary.minimum <= summary.p50 <= summary.p99 <= summary.p99_9 <= summary.maximum
    assert summary.count == sum(map(len, rounds))
    assert len(summary.rounds) == len(rounds)


def test_a_round_without_samples_is_left_out():
    assert summarise("call_us", [[], [3.0]]).rounds == (3.0,)


def test_the_unit_is_the_longest_ending_of_the_name():
    assert [unit_of(name) for name in ("noop_us", "throughput_per_s", "first_s")] == ["µs", "/s", "s"]


def test_a_cell_without_a_unit_is_refused():
    with pytest.raises(ValueError, match="names no unit"):
        unit_of("latency")
