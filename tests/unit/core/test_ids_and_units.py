"""Ids sort by time and say what they name; sizes and durations are read as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.ids import new_id
from isthmus.core.units import format_bytes, format_seconds, parse_bytes


def test_ids_carry_their_prefix_and_are_unique() -> None:
    made = [new_id("ls") for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(each.startswith("ls_") and len(each) == 19 for each in made)


def test_ids_sort_by_time() -> None:
    made = [new_id("ls") for _ in range(2000)]
    times = [each[:11] for each in made]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("512 MB", 512_000_000),
        ("4096", 4096),
        ("1.5k", 1500),
        (" 1 ti ", 2**40),
        (7, 7),
        ("0", 0),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XB", "1e3", "1,5GB", -1, "1" * 400])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


def test_a_size_is_read_once() -> None:
    parse_bytes("3GiB")
    before = parse_bytes.cache_info().hits
    assert parse_bytes("3GiB") == 3 * 2**30
    assert parse_bytes.cache_info().hits == before + 1


@given(count=st.integers(0, 2**60))
def test_formatted_sizes_are_near_what_they_say(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= max(count * 0.06, 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1e-6, "1.0 µs"), (0.002, "2.0 ms"), (5, "5.0 s"), (600, "10 min"), (10_000, "2.8 h")],
)
def test_durations_are_written_shortly(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
