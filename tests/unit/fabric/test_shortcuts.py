"""The native shortcuts of the codec write the same bytes, and read the same values, as what they shorten."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.errors import CodecError
from isthmus.fabric import codec

pytest.importorskip("isthmus.fabric._plain", reason="the codec's shortcuts were not built")

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**64), 2**65),
    st.sampled_from([32, 2**7, 2**8, 2**15, 2**16, 2**31, 2**32, 2**63, 2**64]).flatmap(
        lambda edge: st.integers(-edge - 2, -edge + 2) | st.integers(edge - 2, edge + 2)
    ),
    st.floats(),
    st.text(max_size=300),
    st.text(st.characters(), max_size=40),
    st.binary(max_size=300),
    st.sampled_from([b"x" * 1010, "x" * 1022, b"y" * 5000, "z" * 5000]),
)
ODD = st.one_of(
    st.lists(PLAIN, max_size=3), st.tuples(PLAIN), st.complex_numbers(allow_nan=False), st.builds(bytearray)
)
ARGS = st.lists(st.one_of(PLAIN, PLAIN, PLAIN, ODD), max_size=20).map(tuple)
KWARGS = st.dictionaries(st.text(max_size=8), st.one_of(PLAIN, ODD), max_size=20)


def shortened(shortcut: Callable[..., Any]) -> Callable[..., Any]:
    """The Python function that stands in for a shortcut where it was not built."""
    function: Callable[..., Any] = shortcut.__self__  # type: ignore[attr-defined]
    return function


def outcome(function: Callable[..., Any], *arguments: Any) -> object:
    """What can be compared of a value, NaN and signed zeros included, or of an error."""
    try:
        return exact(function(*arguments))
    except CodecError:
        return CodecError


def exact(value: Any) -> object:
    if isinstance(value, float):
        return "nan" if value != value else (value, math.copysign(1, value))
    if isinstance(value, (list, tuple)):
        return type(value), [exact(item) for item in value]
    if isinstance(value, dict):
        return [(exact(key), exact(item)) for key, item in value.items()]
    return type(value), value


@given(args=ARGS, kwargs=KWARGS | st.just({}))
def test_a_call_is_packed_to_the_same_bytes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    meta, data = codec.pack_call(args, kwargs)
    assert (meta, data) == tuple(shortened(codec.pack_call)(args, kwargs))


@given(value=PLAIN | ODD)
def test_a_value_is_packed_to_the_same_bytes(value: Any) -> None:
    assert tuple(codec.pack_value(value)) == tuple(shortened(codec.pack_value)(value))


@given(args=ARGS, kwargs=KWARGS | st.just({}))
def test_a_packed_call_is_decoded_to_what_it_was(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    meta, data = codec.pack_call(args, kwargs)
    assert exact(codec.decode_call(meta, codec.join(data) if data else None)) == exact((args, kwargs))


@given(body=st.binary(max_size=40), call=st.booleans())
def test_any_bytes_are_decoded_alike(body: bytes, call: bool) -> None:
    meta = b"\x01" + (b"\x92" + body if call else body)
    for decode in (codec.decode_call, codec.decode_value):
        assert outcome(decode, meta, None) == outcome(shortened(decode), meta, None)


@given(args=ARGS, cut=st.integers(0, 200), tail=st.binary(max_size=2))
def test_a_damaged_call_is_decoded_alike(args: tuple[Any, ...], cut: int, tail: bytes) -> None:
    meta = codec.encode_call(args, {"a": 1}).meta[:cut] + tail
    if meta[:1] == b"\x01":
        assert outcome(codec.decode_call, meta, None) == outcome(shortened(codec.decode_call), meta, None)


def test_what_is_no_small_builtin_value_is_left_to_python() -> None:
    class Text(str):
        __slots__ = ()

    for value in (Text("a"), 2**64, "\ud800", b"x" * 1025, {"a": 1}, [1]):
        meta, data = codec.pack_value(value)
        decoded = codec.decode_value(meta, codec.join(data) if data else None)
        assert type(decoded).__name__ == type(value).__name__
        assert decoded == value
