"""What is decoded has the types and values of what was encoded."""

import collections
import enum
import gc
import math
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.core.errors import CodecError, FunctionLoadError, MapError, RemoteError
from isthmus.fabric import codec


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Numbers(list):  # type: ignore[type-arg]
    pass


Point = collections.namedtuple("Point", "x y")


def through(value: Any) -> Any:
    encoded = codec.encode_value(value)
    return codec.decode_value(encoded.meta, codec.join(encoded.data) if encoded.data else None)


def same(one: Any, other: Any) -> bool:
    """Equal in type and value all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, other) and (one == other or one != one)
    return bool(one == other)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(),
    st.binary(), st.binary(min_size=5000, max_size=5001), st.complex_numbers(allow_nan=False),
    st.just(Colour.RED),
    st.builds(Text, st.text()), st.builds(bytearray, st.binary()), st.characters(categories=["Cs"]),
    st.frozensets(st.integers()), st.just(Point(1, (2,))), st.builds(Numbers, st.lists(st.integers())),
)  # fmt: skip
ARRAYS = st.builds(
    lambda kind, shape, seed: np.array(np.random.default_rng(seed).random(shape) * 100).astype(kind),
    st.sampled_from(["?", "i1", "<i8", ">i4", "f2", "f8", "g", "c16", "U3", "S4", "O", "M8[s]", "i4,f8"]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.integers(0, 9),
)
KEYS = st.one_of(st.text(), st.integers(), st.none(), st.tuples(st.integers()))
VALUES = st.recursive(
    st.one_of(SCALARS, ARRAYS.filter(lambda array: array.dtype != object)),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(value=VALUES)
def test_values_come_back_with_their_types(value: Any) -> None:
    assert same(through(value), value)


@settings(max_examples=40)
@given(args=st.lists(VALUES, max_size=3).map(tuple), kwargs=st.dictionaries(st.text(), VALUES, max_size=2))
def test_calls_come_back_with_their_types(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    encoded = codec.encode_call(args, kwargs)
    assert same(codec.decode_call(encoded.meta, codec.join(encoded.data)), (args, kwargs))
    meta, data = codec.pack_call(args, kwargs)
    assert same(codec.decode_call(meta, codec.join(data)), (args, kwargs))


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(20)[::3],
        np.arange(6).reshape(2, 3).T,
        np.zeros((0, 3)),
        np.array(3.5),
        np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.zeros(3, np.dtype("f8", metadata={"unit": "m"})),
    ],
)
def test_arrays_of_every_form_come_back(array: Any) -> None:
    assert same(through(array), array)
    assert same(through({"a": (array, [array])})["a"][0], array)
    assert through(array).dtype.metadata == array.dtype.metadata


def test_object_and_masked_arrays_come_back() -> None:
    assert through(np.array([1, None, "a"], dtype=object)).tolist() == [1, None, "a"]
    masked = through(np.ma.masked_array([1, 2, 3], [0, 1, 0]))
    assert masked.tolist() == [1, None, 3]


def test_large_arrays_and_bytes_are_not_copied() -> None:
    array, block = np.arange(1001.0), b"x" * 10_000
    [one, _, two] = codec.encode_call((array, block), {}).data
    assert np.shares_memory(np.frombuffer(one, "f8"), array)
    assert two is block
    data = codec.join([one])
    encoded = codec.encode_value(array)
    decoded = codec.decode_value(encoded.meta, data)
    assert np.shares_memory(decoded, np.frombuffer(data, "u1"))
    assert decoded.flags.writeable


class Payload(bytearray):
    """Data that can tell when nobody has it any more."""


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(9000, "u1"),
        ("put", 3, np.zeros(9000, "u1")),
        [{"a": np.zeros(9000, "u1")}, b"x" * 9000],
        memoryview(bytes(9000)),
        Holder(np.zeros(9000, "u1")),
    ],
)
def test_received_data_goes_with_the_last_value_that_uses_it(value: Any) -> None:
    """Not when the garbage collector next comes by: large arguments would pile up until then."""
    encoded = codec.encode_value(value)
    data = Payload(codec.join(encoded.data))
    gone = weakref.ref(data)
    gc.disable()
    try:
        decoded = codec.decode_value(encoded.meta, memoryview(data))
        del data
        assert type(decoded) is type(value)
        assert gone() is not None
        del decoded
        assert gone() is None
    finally:
        gc.enable()


def test_memoryviews_keep_format_and_shape() -> None:
    view = memoryview(np.arange(6.0).reshape(2, 3))
    for decoded in (through(view), through({1, 2} and [view] * 200)[0]):
        assert (decoded.format, decoded.shape, decoded.tolist()) == ("d", (2, 3), view.tolist())


def test_one_object_does_not_become_two() -> None:
    shared: list[int] = []
    first, second = through([shared, shared])
    assert first is second
    loop: list[Any] = []
    loop.append(loop)
    decoded = through(loop)
    assert decoded[0] is decoded


def test_local_classes_and_lambdas_travel() -> None:
    class Local:
        def __init__(self) -> None:
            self.value = 5

    assert through(Local()).value == 5
    assert through(lambda: 7)() == 7
    assert codec.decode_function(codec.encode_function(lambda x: x + 1))(1) == 2


def test_what_cannot_be_sent_is_named_by_its_path() -> None:
    with pytest.raises(CodecError, match=r"cannot send args\[1\]\['lock'\]: a _thread.lock"):
        codec.encode_call((1, {"lock": threading.Lock()}), {})
    with pytest.raises(CodecError, match=r"cannot send kwargs\['x'\]\[0\]"):
        codec.encode_call((), {"x": [threading.Lock()]})
    lock = threading.Lock()
    with pytest.raises(CodecError, match="its variable lock"):
        codec.encode_function(lambda: lock)


def test_a_missing_module_is_named() -> None:
    code = b"\x80\x05cno_such_module\nf\n."
    with pytest.raises(FunctionLoadError, match="'no_such_module'"):
        codec.decode_function(code)


# exceptions -------------------------------------------------------------------------------------------------
class Picky(Exception):
    def __init__(self, code: int, *, why: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.why = code, why


class Locked(Exception):
    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class Broken(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


def error_through(error: BaseException) -> BaseException:
    try:
        try:
            raise KeyError("the first")
        except KeyError as first:
            raise error from first
    except BaseException as raised:
        encoded = codec.encode_error(raised)
    return codec.decode_error(encoded.meta, codec.join(encoded.data) if encoded.data else None)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"), OSError(2, "gone", "file"), KeyError("k"), SystemExit(3),
        MapError("m", ((1, ValueError("v")),)), UnicodeDecodeError("utf-8", b"ab", 0, 1, "bad"),
        Picky(3, why="because"), RemoteError("text" * 20_000),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_exceptions_come_back_as_themselves(error: BaseException) -> None:
    decoded = error_through(error)
    assert type(decoded) is type(error)
    assert decoded.args == error.args
    assert vars(decoded).keys() == vars(error).keys()
    text = str(decoded.__cause__)
    assert isinstance(decoded.__cause__, codec.RemoteTraceback)
    assert "KeyError: 'the first'" in text
    assert "test_codec.py" in text


def test_exception_groups_come_back_whole() -> None:
    decoded = error_through(ExceptionGroup("several", [Picky(1, why="a"), OSError(2, "b")]))
    assert isinstance(decoded, ExceptionGroup)
    assert [type(each) for each in decoded.exceptions] == [Picky, FileNotFoundError]
    assert decoded.exceptions[0].why == "a"  # type: ignore[attr-defined]


def test_exceptions_that_cannot_travel_leave_their_text() -> None:
    decoded = error_through(Locked())
    assert type(decoded) is RemoteError
    assert "Locked: locked" in str(decoded)
    assert "Locked: locked" in str(decoded.__cause__)
    assert "its __str__ failed" not in str(error_through(ValueError("\ud800")))
    assert isinstance(error_through(Broken()), Broken)


def test_an_exception_whose_class_is_missing_here_leaves_its_text() -> None:
    import sys
    import types

    module = types.ModuleType("vanishing")
    exec("class Gone(Exception): pass", vars(module))
    sys.modules["vanishing"] = module
    encoded = codec.encode_error(module.Gone("away"))
    del sys.modules["vanishing"]
    decoded = codec.decode_error(encoded.meta, None)
    assert type(decoded) is RemoteError
    assert "vanishing.Gone: away" in str(decoded)
    assert "No module named 'vanishing'" in str(decoded)


@pytest.mark.parametrize(
    "meta", [b"", b"\x00", b"\xff", b"\x01", b"\x02\xc1", b"\x03\x92", b"\x08", b"\x10", b"\x10\x90"]
)
def test_wrong_bytes_are_codec_errors(meta: bytes) -> None:
    for decode in (codec.decode_value, codec.decode_call, codec.decode_error):
        with pytest.raises(CodecError):
            decode(meta, None)
