"""The out-of-band part of an encoded value: buffers one after the other, each at a multiple of 64 bytes.

64 is a cache line, and what NumPy and vector units want. Offsets come from the wire, so `Region` checks each
of them."""

from collections.abc import Sequence
from typing import NamedTuple

from isthmus.core.errors import CodecError

Buffer = bytes | bytearray | memoryview

ALIGNMENT_BYTES = 64
INLINE_BYTES_MAX = 4096  # smaller things are cheaper to copy into `meta` than to carry apart
_PADDING = bytes(ALIGNMENT_BYTES)
_EMPTY = memoryview(bytearray())


class Encoded(NamedTuple):
    """An encoded value: `meta` travels in the frame, `data` beside it, without a copy where it is large."""

    meta: bytes
    data: tuple[Buffer, ...]


class Layout:
    """Collects buffers for sending and tells at which offset of the data each will begin."""

    __slots__ = ("_end", "buffers")

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._end = 0

    def add(self, buffer: Buffer) -> int:
        gap_bytes = -self._end % ALIGNMENT_BYTES
        if gap_bytes:
            self.buffers.append(_PADDING[:gap_bytes])
        offset = self._end + gap_bytes
        self.buffers.append(buffer)
        self._end = offset + (buffer.nbytes if isinstance(buffer, memoryview) else len(buffer))
        return offset


class Region:
    """Received data. `part` gives views on it, never a copy."""

    __slots__ = ("_view",)

    def __init__(self, data: Buffer | None) -> None:
        view = _EMPTY if data is None else memoryview(data)
        self._view = view if view.format == "B" and view.ndim == 1 else view.cast("B")

    def part(self, offset: object, size_bytes: object) -> memoryview:
        """Raises CodecError when the part is not inside the data."""
        if not isinstance(offset, int) or not isinstance(size_bytes, int):
            raise CodecError(f"not a part of the data: {offset!r}, {size_bytes!r}")
        if not 0 <= offset <= offset + size_bytes <= len(self._view):
            raise CodecError(
                f"bytes {offset} to {offset + size_bytes} are outside the data of {len(self._view)}"
            )
        return self._view[offset : offset + size_bytes]

    def whole(self) -> memoryview:
        return self._view


def join(buffers: Sequence[Buffer]) -> memoryview:
    """The buffers as the receiver would get them: one writable block. Copies; for tests and stored calls."""
    return memoryview(bytearray().join(buffers))
