"""Small trees of builtin values and NumPy arrays as msgpack: the fast and the safe half of the codec.

Exactness comes first. Only values of exactly the builtin types go this way, so that what arrives has the same
types; a tree that is too large, refers to one mutable object twice, or holds anything else raises NotATree,
and the caller pickles it. Reading runs no code of the sender: any bytes give a value or CodecError.

layout  rest of `meta`
PLAIN   msgpack of None, bool, int, float, str, bytes, list, dict (and the call's own outermost tuple)
TREE    the same with extension types: tuples, and arrays or bytes that lie in `data`
ARRAY   msgpack [dtype, shape] of one array, which is all of `data`
"""

import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.msgpack import Ext

from isthmus.core.errors import CodecError
from isthmus.fabric._buffers import INLINE_BYTES_MAX, Buffer, Encoded, Layout, Region

if TYPE_CHECKING:
    import numpy

PLAIN, TREE, ARRAY = b"\x01", b"\x02", b"\x03"
NODES_MAX = 128  # beyond it, the C pickler overtakes a walk in Python
DEPTH_MAX = 16

ATOMS = frozenset({int, float, bool, type(None)})
_DTYPE = re.compile(r"[<>|=][biufcSUMm]\d+(\[[0-9]*[A-Za-z]+\])?")
_EXT_TUPLE, _EXT_ARRAY, _EXT_BYTES, _EXT_BYTEARRAY, _EXT_MEMORYVIEW = 1, 2, 3, 4, 5
_VIEW_FORMATS = frozenset("cbB?hHiIlLqQnNfd")
_dtypes: dict[str, Any] = {}  # parsed once: numpy.dtype(text) costs more than the rest of reading an array
_DTYPES_MAX = 256


class NotATree(Exception):
    """This value must be pickled."""


def is_flat(values: Iterable[object]) -> bool:
    """True when every value is an atom or short text or bytes: PLAIN holds them without a further look."""
    for value in values:
        kind = type(value)
        if kind in ATOMS:
            continue
        if (kind is bytes or kind is str) and len(value) <= INLINE_BYTES_MAX:  # type: ignore[arg-type]
            continue
        return False
    return True


def _refuse_ext(code: int, data: memoryview) -> object:
    raise CodecError(f"extension type {code} does not belong into a plain value")


_new = tuple.__new__  # half the price of calling the NamedTuple itself
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ext_hook=_refuse_ext).decode
_decode_call = msgspec.msgpack.Decoder(tuple[tuple[Any, ...], dict[Any, Any]], ext_hook=_refuse_ext).decode
# what hostile or damaged bytes can make the decoder raise; ValueError covers Unicode errors too
_BAD_BYTES = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError, MemoryError)


# writing ----------------------------------------------------------------------------------------------------
def encode_plain(value: object) -> Encoded:
    """Raises NotATree for ints beyond 64 bits and text with lone surrogates."""
    try:
        return _new(Encoded, (PLAIN + _encode(value), ()))
    except (OverflowError, UnicodeEncodeError) as error:
        raise NotATree from error


def encode_array(array: "numpy.ndarray[Any, Any]") -> Encoded:
    """Raises NotATree unless the array is C-contiguous and of a simple dtype."""
    return Encoded(ARRAY + _encode((_dtype_text(array), array.shape)), (_bytes_of(array),))


def encode_tree(value: object) -> Encoded:
    """Raises NotATree when the value must be pickled."""
    walk = _Walk()
    try:
        meta = _encode(walk.node(value, 0))
    except (OverflowError, UnicodeEncodeError) as error:
        raise NotATree from error
    return Encoded(TREE + meta, tuple(walk.layout.buffers))


class _Walk:
    """One pass over a value: gives what msgpack shall write and lays out what goes beside it."""

    __slots__ = ("_left", "_seen", "layout")

    def __init__(self) -> None:
        self.layout = Layout()
        self._left = NODES_MAX
        self._seen: set[int] = set()

    def node(self, value: Any, depth: int) -> object:
        kind = type(value)
        self._left -= 1
        if kind in ATOMS:
            return value
        if self._left < 0 or depth > DEPTH_MAX:
            raise NotATree
        if kind is str or kind is bytes:
            return self._text(value)
        if kind is tuple:
            return Ext(_EXT_TUPLE, _encode([self.node(item, depth + 1) for item in value]))
        self._once(value)
        if kind is list:
            if len(value) > self._left:
                raise NotATree
            return value if is_flat(value) else [self.node(item, depth + 1) for item in value]
        if kind is dict:
            return self._dict(value, depth)
        return self._block(value, kind)

    def _once(self, value: object) -> None:
        """A mutable object must not become two."""
        if id(value) in self._seen:
            raise NotATree
        self._seen.add(id(value))

    def _text(self, value: str | bytes) -> object:
        if len(value) <= INLINE_BYTES_MAX:
            return value
        if isinstance(value, str):
            raise NotATree
        return Ext(_EXT_BYTES, _encode((self.layout.add(value), len(value))))

    def _dict(self, value: dict[object, object], depth: int) -> object:
        if len(value) > NODES_MAX or not is_flat(value):
            raise NotATree
        if is_flat(value.values()):
            return value
        return {key: self.node(item, depth + 1) for key, item in value.items()}

    def _block(self, value: Any, kind: type) -> object:
        if is_array_type(kind):
            text, data = _dtype_text(value), _bytes_of(value)
            return Ext(_EXT_ARRAY, _encode((self.layout.add(data), text, value.shape)))
        if kind is bytearray:
            return Ext(_EXT_BYTEARRAY, _encode((self.layout.add(value), len(value))))
        if (
            kind is memoryview
            and value.c_contiguous
            and value.format in _VIEW_FORMATS
            and 0 not in value.shape
        ):
            offset = self.layout.add(value.cast("B"))
            return Ext(_EXT_MEMORYVIEW, _encode((offset, value.nbytes, value.format, value.shape)))
        raise NotATree


def is_array_type(kind: type) -> bool:
    """Whether it is exactly numpy.ndarray, without importing NumPy for those who never use it."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind is getattr(numpy, "ndarray", None)


def _dtype_text(array: "numpy.ndarray[Any, Any]") -> str:
    dtype = array.dtype
    text: str = dtype.str
    if _DTYPE.fullmatch(text) is None or dtype.metadata is not None or not array.flags.c_contiguous:
        raise NotATree
    return text


def _bytes_of(array: "numpy.ndarray[Any, Any]") -> memoryview:
    """The array's own memory, seen as bytes: datetimes and long doubles have no buffer format."""
    return array.reshape(-1).view("u1").data if array.nbytes else memoryview(b"")


# reading ----------------------------------------------------------------------------------------------------
def decode_plain(body: Buffer) -> Any:
    try:
        return _decode(body)
    except _BAD_BYTES as error:
        raise CodecError(f"not an encoded value: {error}") from error


def decode_plain_call(body: Buffer) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Typed, so that the decoder checks the shape: cheaper than a look at what came out."""
    try:
        return _decode_call(body)
    except _BAD_BYTES as error:
        raise CodecError(f"not an encoded call: {error}") from error


def decode_array(body: Buffer, region: Region) -> "numpy.ndarray[Any, Any]":
    try:
        text, shape = _decode(body)
        return _array(region.whole(), text, shape)
    except _BAD_BYTES as error:
        raise CodecError(f"not an encoded array: {error}") from error


def decode_tree(body: Buffer, region: Region) -> Any:
    try:
        return msgspec.msgpack.decode(body, ext_hook=_Hook(region))
    except _BAD_BYTES as error:
        raise CodecError(f"not an encoded value: {error}") from error


class _Hook:
    """What msgpack's extension types stand for. No closure: one that names itself keeps its region, all that
    came with the frame, until the garbage collector comes by.
    """

    __slots__ = ("_region",)

    def __init__(self, region: Region) -> None:
        self._region = region

    def __call__(self, code: int, data: memoryview) -> object:
        if code == _EXT_TUPLE:
            return tuple(_items(msgspec.msgpack.decode(data, ext_hook=self)))
        return _block(code, _items(_decode(data)), self._region)


def _items(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise CodecError(f"expected a list, got {type(value).__name__}")
    return value


def _block(code: int, fields: list[Any], region: Region) -> object:
    match code, fields:
        case 2, [offset, text, shape]:
            return _array(region.part(offset, _array_bytes(text, shape)), text, shape)
        case 3, [offset, size_bytes]:
            return bytes(region.part(offset, size_bytes))
        case 4, [offset, size_bytes]:
            return bytearray(region.part(offset, size_bytes))
        case 5, [offset, size_bytes, str() as letter, list() as shape] if letter in _VIEW_FORMATS:
            return region.part(offset, size_bytes).cast(letter, shape)  # type: ignore[call-overload]
        case _:
            raise CodecError(f"unknown extension type {code} with {len(fields)} fields")


def _array(data: memoryview, text: Any, shape: Any) -> "numpy.ndarray[Any, Any]":
    """A view on `data`; it must have exactly the size that dtype and shape need."""
    import numpy

    size_bytes = _array_bytes(text, shape)
    if size_bytes != len(data):
        raise CodecError(f"an array of {text} {shape} has {size_bytes} bytes, the data has {len(data)}")
    return numpy.ndarray(shape, _dtype(text), data if size_bytes else None)


def _array_bytes(text: Any, shape: Any) -> int:
    size_bytes: int = _dtype(text).itemsize
    if not isinstance(shape, list) or len(shape) > 32:
        raise CodecError(f"not a shape: {shape!r}")
    for length in shape:
        if not isinstance(length, int) or not 0 <= length < 2**48:
            raise CodecError(f"not a shape: {shape}")
        size_bytes *= length
    return size_bytes


def _dtype(text: Any) -> Any:
    dtype = _dtypes.get(text)
    if dtype is None:
        if not isinstance(text, str) or _DTYPE.fullmatch(text) is None:
            raise CodecError(f"not a dtype: {text!r}")
        import numpy

        dtype = numpy.dtype(text)
        if len(_dtypes) < _DTYPES_MAX:
            _dtypes[text] = dtype
    return dtype


__all__ = [
    "ARRAY",
    "PLAIN",
    "TREE",
    "Buffer",
    "NotATree",
    "decode_array",
    "decode_plain",
    "decode_tree",
    "encode_array",
    "encode_plain",
    "encode_tree",
    "is_array_type",
    "is_flat",
]
