"""Any bytes give a value or the reader's own error, nothing else."""

import contextlib
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus.core.errors import CodecError
from isthmus.core.ids import LeaseId, NodeId, TenantId
from isthmus.core.tokens import Claims, sign
from isthmus.fabric import codec
from isthmus.fabric.frames import Header, Hello, Kind, pack_handshake, pack_header
from isthmus.node import messages
from tests.fuzz import targets

# valid examples, so that damage reaches beyond the first check
_HELLO = pack_handshake(Hello(token="t", python="p", isthmus="0"))
_TREE = codec.encode_value(
    ({"a": [np.arange(6.0).reshape(2, 3), bytearray(b"xyz"), memoryview(b"ab")]}, b"q" * 5000)
)
_ARRAY = codec.encode_value(np.arange(5))
_SEEDS = [
    _HELLO,
    _HELLO[4:],
    pack_header(Header(Kind.CALL, 0, 1, 1, 5, 0, 0, 0, 3, 4)) + b"abcdefg",
    sign(
        Claims(lease=LeaseId("ls_1"), tenant=TenantId("t"), node=NodeId("n"), expires_s=1.0), targets.KEY
    ).encode(),
    messages.encode(messages.Done(number=1)),
    msgspec.msgpack.encode([1, {"a": (2, b"x")}]),
    codec.encode_call((1, "a"), {"k": b"v"}).meta,
    b"CodecError: broken",
]


def damaged(seed: bytes) -> st.SearchStrategy[bytes]:
    """The seed with some bytes replaced, cut off or added."""
    edits = st.lists(st.tuples(st.integers(0, max(len(seed) - 1, 0)), st.integers(0, 255)), max_size=4)

    def apply(changes: list[tuple[int, int]], length: int, tail: bytes) -> bytes:
        data = bytearray(seed)
        for place, byte in changes:
            data[place] = byte
        return bytes(data[:length]) + tail

    return st.builds(apply, edits, st.integers(0, len(seed)), st.binary(max_size=8))


ANY_BYTES = st.one_of(st.binary(max_size=300), *map(damaged, _SEEDS))
_FUZZ = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.__name__)
@_FUZZ
@given(data=ANY_BYTES)
def test_any_bytes_give_a_value_or_the_readers_own_error(
    target: Callable[[bytes], None], data: bytes
) -> None:
    target(data)


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.__name__)
@pytest.mark.parametrize("before", [b"", b"\x82\xa1x", b"\x11\x82\xa1x"], ids=["bare", "field", "words"])
def test_nesting_without_end_ends_in_the_readers_own_error(
    target: Callable[[bytes], None], before: bytes
) -> None:
    """A struct with an unknown field makes the reader skip it, however deep it goes."""
    body = before + b"\x91" * 60_000
    target(body)
    target(len(body).to_bytes(4, "little") + body)


@pytest.mark.parametrize("encoded", [_TREE, _ARRAY], ids=["tree", "array"])
@_FUZZ
@given(draw=st.data())
def test_damaged_values_end_in_codec_errors(encoded: codec.Encoded, draw: st.DataObject) -> None:
    meta = draw.draw(damaged(encoded.meta))
    if meta[:1] == bytes([targets.PICKLE_LAYOUT]):
        return
    data = codec.join(encoded.data)
    cut = draw.draw(st.integers(0, len(data)))
    for view in (data, data[:cut], None):
        with contextlib.suppress(CodecError):
            codec.decode_value(meta, view)


@_FUZZ
@given(length=st.integers(0, 400))
def test_a_truncated_pickle_ends_in_a_codec_error(length: int) -> None:
    encoded = codec.encode_value({1, 2, "three", complex(1, 2)})
    length = min(length, len(encoded.meta) - 1)
    with pytest.raises(CodecError):
        codec.decode_value(encoded.meta[:length], None)
