"""What each reader of foreign bytes promises: a value or its own error. Used by both fuzzers."""

import contextlib

import msgspec

from isthmus.core.errors import CodecError, FrameError, TokenError
from isthmus.core.ids import LeaseId
from isthmus.core.tokens import verify
from isthmus.fabric import bootstrap, codec
from isthmus.fabric.frames import DATA_BYTES_MAX, unpack_handshake, unpack_header
from isthmus.fabric.streams import Ends, _Arriving
from isthmus.node import messages

KEY = bytes(32)
PICKLE_LAYOUT = 0x08  # runs the sender's code by design; only a tenant's own processes read it


def header(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        unpack_header(data)


def handshake(data: bytes) -> None:
    with contextlib.suppress(FrameError):
        unpack_handshake(data)


def bootstrap_steps(data: bytes) -> None:
    """The state machine fed in pieces, as a socket would."""
    state: object = bootstrap.Receiving()
    try:
        while data and isinstance(state, bootstrap.Receiving):
            piece, data = data[: state.needed_bytes], data[state.needed_bytes :]
            state = bootstrap.step(state, piece)
    except FrameError:
        pass


def token(data: bytes) -> None:
    with contextlib.suppress(TokenError):
        verify(data.decode("latin-1"), KEY, LeaseId("ls_1"), 0.0)


def message(data: bytes) -> None:
    with contextlib.suppress(msgspec.MsgspecError):
        messages.decode(data)


def stream(data: bytes) -> None:
    """Frames on a stream; sizes are cut so that no input asks for terabytes."""
    arriving = _Arriving(Ends(1, 1, 1, 1), DATA_BYTES_MAX)
    try:
        arriving.feed(memoryview(data))
    except FrameError:
        pass
    finally:
        arriving.close()


def value(data: bytes) -> None:
    meta, rest = data[: len(data) // 2], data[len(data) // 2 :]
    if meta[:1] == bytes([PICKLE_LAYOUT]):
        return
    for decode in (codec.decode_value, codec.decode_call):
        with contextlib.suppress(CodecError):
            decode(meta, memoryview(bytearray(rest)))


def words(data: bytes) -> None:
    """Errors without a pickle; those with one are trusted."""
    try:
        codec.decode_error(b"\x11" + data, None)
        codec.decode_header(data)
    except CodecError:
        pass


TARGETS = (header, handshake, bootstrap_steps, token, message, stream, value, words)
