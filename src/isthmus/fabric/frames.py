"""The wire format: one 64-byte header before every message, and the handshake that precedes the first.

Pure: bytes in, values out. Any bytes give a value or FrameError, nothing else.

A frame is header, `meta` (in-band bytes: the codec's description of the value) and `data` (out-of-band
buffers, one after the other; the codec knows where each begins). The same 64 bytes travel in a UCX active
message and on a socket. `native/frame.hpp` holds the same layout; a golden test compares them. A change of
any field raises FRAME_VERSION. A header that says what this version does not know - another version, kind or
flag - is no frame: a stream with one ends with FrameError, a UCX message with one is dropped and counted.

offset  size  field
     0     2  version          FRAME_VERSION
     2     1  kind             Kind
     3     1  flags            Flag
     4     4  channel_id       the number the *receiver* gave this channel in the handshake
     8     8  channel_key      the receiver's secret for it: a frame with another key is dropped and counted
    16     8  call_id          chosen by the caller, unique on the channel
    24     8  deadline_ns      nanoseconds left when it was sent; 0 = none (relative: clocks need not agree)
    32     4  function_id      index in the channel's function table (CALL, DEFINE); tag for PEER messages
    36     4  credits          frames the receiver of this frame may now have in flight (RESULT, REFUSED)
    40     8  meta_bytes
    48     8  data_bytes
    56     8  sequence         sockets: 0 (streams are in order); UCX: the frame's place on its channel
"""

import enum
import struct
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from isthmus.core.errors import FrameError

FRAME_VERSION = 1
CODEC_VERSION = 1
HEADER_BYTES = 64
META_BYTES_MAX = 64 * 2**20
DATA_BYTES_MAX = 2**40
HANDSHAKE_BYTES_MAX = 65536

HEADER = struct.Struct("<HBBIQQQIIQQQ")
assert HEADER.size == HEADER_BYTES


class Kind(enum.IntEnum):
    CALL = 1  # client -> executor: call function_id with the encoded arguments
    RESULT = 2  # executor -> client: its result
    ERROR = 3  # executor -> client: an exception (codec.encode_error)
    YIELD = 4  # executor -> client: one item of a generator; RESULT ends the stream.
    # client -> executor: `credits` more items of call_id may be sent (a CALL's own `credits` begin it)
    DEFINE = 5  # client -> executor: meta describes function_id, data is its code
    CANCEL = 6  # client -> executor, urgent: stop call_id (running: raise in it; queued: answer cancelled)
    REFUSED = 7  # executor -> client: not admitted (draining, no credit); meta and data as encode_error
    GOODBYE = 8  # either side: this channel ends in order
    PEER = (
        9  # executor <-> executor: a message of a group; function_id is its tag, call_id its sequence number
    )
    LOST = 10  # never on the wire: made by a domain when a channel's peer is gone; meta says why


class Flag(enum.IntFlag):
    NONE = 0
    MORE = 1  # with YIELD: the client paces by credits
    NO_REPLY = 2
    SHARED = 4  # `data` is not in the message but in memory of this machine. Set and cleared by the domains.
    # sockets: in a sealed memfd that rides on this frame's bytes
    # UCX: in the sender's arena, at the offset that the 8 bytes behind `meta` tell


FLAGS_KNOWN = Flag.MORE | Flag.NO_REPLY | Flag.SHARED


class Header(NamedTuple):
    kind: int
    flags: int
    channel_id: int
    channel_key: int
    call_id: int
    deadline_ns: int
    function_id: int
    credits: int
    meta_bytes: int
    data_bytes: int


def pack_header(header: Header) -> bytes:
    """What `unpack_header` reads. The domains pack their headers in place; tests and tools use this."""
    return HEADER.pack(FRAME_VERSION, *header, 0)


def unpack_header(data: bytes | bytearray | memoryview) -> Header:
    """A header from a socket. Raises FrameError when it is of no known kind or announces impossible sizes."""
    if len(data) != HEADER_BYTES:
        raise FrameError(f"a frame header has {HEADER_BYTES} bytes, got {len(data)}")
    version, kind, flags, channel_id, key, call_id, deadline_ns, function_id, credit, meta, size, sequence = (
        HEADER.unpack(data)
    )
    if version != FRAME_VERSION:
        raise FrameError(f"frame version {version}, this side speaks {FRAME_VERSION}")
    if not Kind.CALL <= kind <= Kind.PEER or flags > FLAGS_KNOWN or sequence:
        raise FrameError(f"not a frame: kind {kind}, flags {flags}, sequence {sequence}")
    if meta > META_BYTES_MAX or size > DATA_BYTES_MAX:
        raise FrameError(
            f"frame announces {meta} + {size} bytes, limits are {META_BYTES_MAX} + {DATA_BYTES_MAX}"
        )
    return Header(kind, flags, channel_id, key, call_id, deadline_ns, function_id, credit, meta, size)


# handshake --------------------------------------------------------------------------------------------------
# On the bootstrap socket, each message is a 4-byte little-endian length and one msgpack struct, tagged.


ChannelNumber = Annotated[int, Meta(ge=0, lt=2**32)]
ChannelKey = Annotated[int, Meta(ge=0)]  # msgpack has no larger ones than 64 bits


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello", forbid_unknown_fields=True):
    """First message of the side that connects."""

    token: str
    python: str  # core.model.python_version()
    isthmus: str
    frame_version: int = FRAME_VERSION
    codec_version: int = CODEC_VERSION
    role: str = "client"  # or "peer": another rank of the same group
    rank: int = -1
    host: str = ""  # boot id + network namespace: equal means shared memory can work
    channel_id: ChannelNumber = 0  # what the acceptor must put into frames it sends
    channel_key: ChannelKey = 0
    domains: tuple[str, ...] = ("sockets",)  # in order of preference: "ucx", "sockets"
    ucx_address: bytes = b""


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag="welcome", forbid_unknown_fields=True):
    """The acceptor's answer: `domain` is what both will use from the next byte on."""

    executor: str
    python: str
    isthmus: str
    channel_id: ChannelNumber
    channel_key: ChannelKey
    credits: int
    domain: str = "sockets"
    ucx_address: bytes = b""
    pid: int = 0
    host: str = ""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, tag="refusal", forbid_unknown_fields=True):
    """The acceptor's other answer; `code` is a class name in core.errors. The socket closes after it."""

    code: str
    message: str


Handshake = Hello | Welcome | Refusal
_HANDSHAKE: msgspec.msgpack.Decoder[Handshake] = msgspec.msgpack.Decoder(Handshake)


def pack_handshake(message: Handshake) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def handshake_bytes(prefix: bytes) -> int:
    """Length of the body that follows this 4-byte prefix. Raises FrameError when it exceeds the limit."""
    size = int.from_bytes(prefix, "little")
    if len(prefix) != 4 or not 0 < size <= HANDSHAKE_BYTES_MAX:
        raise FrameError(f"not an isthmus handshake: announces {size} bytes, at most {HANDSHAKE_BYTES_MAX}")
    return size


def unpack_handshake(body: bytes) -> Handshake:
    try:
        return _HANDSHAKE.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # nested without end
        raise FrameError(f"not an isthmus handshake: {error}") from error
