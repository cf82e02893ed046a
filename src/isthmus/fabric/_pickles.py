"""The other half of the codec: everything that is no small tree, by cloudpickle with out-of-band buffers.

Pickles are code. They are read only where they were meant to run: in a tenant's executor, and in the client
that called it. `meta` is `PICKLE` and msgpack [stream or its length, [(offset, bytes), ...]]; a long stream
is itself the first part of the data."""

import io
import pickle
import types
from collections.abc import Iterable, Iterator
from typing import Any, cast

import cloudpickle  # type: ignore[import-untyped]
import msgspec

from isthmus.core.errors import CodecError
from isthmus.fabric._buffers import INLINE_BYTES_MAX, Buffer, Encoded, Layout, Region

PICKLE = b"\x08"
STREAM_BYTES_MAX = 32768  # a longer pickle travels as data, which may be large, not as meta, which may not
BUFFERS_MAX = 1024  # out-of-band parts of one value; the rest goes into the stream
_PROTOCOL = 5
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not in C
_SEARCH_DEPTH_MAX = 8
_SEARCH_WIDTH_MAX = 1000

Body = tuple[bytes | int, list[tuple[int, int]]]
_encode = msgspec.msgpack.Encoder().encode
_body = msgspec.msgpack.Decoder(Body)


def encode_pickle(value: object, names: dict[str, object]) -> Encoded:
    """`names`: the parts of the value by what a CodecError shall call them: `args`, `the result`."""
    parts: list[memoryview] = []
    try:
        stream = dumps(value, parts)
    except Exception as error:  # __reduce__ and __getstate__ are the user's code: they raise what they like
        raise _unsendable(names, error) from error
    layout = Layout()
    body: bytes | int = stream
    if len(stream) > STREAM_BYTES_MAX:
        layout.add(stream)
        body = len(stream)
    places = [(layout.add(part), part.nbytes) for part in parts]
    return Encoded(PICKLE + _encode((body, places)), tuple(layout.buffers))


def decode_pickle(body: Buffer, region: Region) -> Any:
    try:
        stream, places = _body.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"not an encoded value: {error}") from error
    code = stream if isinstance(stream, bytes) else region.part(0, stream)
    return loads(code, [region.part(offset, size_bytes) for offset, size_bytes in places])


def dumps(value: object, parts: list[memoryview] | None = None) -> bytes:
    """A pickle; large buffers go to `parts`, if given. Raises whatever the value's own code raises."""
    file = io.BytesIO()
    callback = None if parts is None else _collect(parts)
    _Pickler(file, _PROTOCOL, buffer_callback=callback).dump(value)
    return file.getvalue()


def loads(stream: bytes | memoryview, parts: Iterable[memoryview] = ()) -> Any:
    """Raises CodecError whatever goes wrong; the reason is its __cause__."""
    try:
        return pickle.loads(stream, buffers=parts)
    except ModuleNotFoundError as error:
        raise CodecError(
            f"cannot rebuild a value: module {error.name!r} is missing here; add it to the environment's "
            "requirements, or send plain data"
        ) from error
    except Exception as error:  # __setstate__ and constructors are the user's code: they raise what they like
        raise CodecError(f"cannot rebuild a value: {type(error).__name__}: {error}") from error


def _collect(parts: list[memoryview]) -> Any:
    def collect(buffer: pickle.PickleBuffer) -> bool:
        """True: keep it in the stream."""
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if view.nbytes < INLINE_BYTES_MAX or len(parts) >= BUFFERS_MAX:
            return True
        parts.append(view)
        return False

    return collect


# what pickle cannot do by itself ----------------------------------------------------------------------------
class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, and it can send memoryviews and exceptions with a constructor of their own."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is memoryview:
            flat = obj if obj.c_contiguous else memoryview(obj.tobytes())
            return _rebuild_view, (
                pickle.PickleBuffer(flat.cast("B") if obj.nbytes else b""),
                obj.format,
                obj.shape,
            )
        if isinstance(obj, BaseException) and _loses_arguments(obj):
            return _rebuild_exception, (type(obj), obj.args, obj.__dict__)
        return super().reducer_override(obj)


def _rebuild_view(data: Any, letter: str, shape: tuple[int, ...]) -> memoryview:
    view = memoryview(data)
    whole: Any = view  # typeshed knows only literal formats
    return cast(memoryview, whole.cast(letter) if 0 in shape else whole.cast(letter, shape))


def _loses_arguments(error: BaseException) -> bool:
    """Pickle would call the class with `args`: wrong where __init__ takes other things than it passes up."""
    kind = type(error)
    plain = kind.__reduce__ is BaseException.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__
    return plain and isinstance(kind.__init__, types.FunctionType)


def _rebuild_exception(
    kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    """As it was, without running its own __init__; the builtin one below it still sets its own fields."""
    error = kind.__new__(kind, *args)
    builtin: Any = next(base for base in kind.__mro__ if not base.__flags__ & _HEAP_TYPE)
    builtin.__init__(error, *args)
    error.args = args
    error.__dict__.update(state)
    return error


# which part of a value is to blame --------------------------------------------------------------------------
def _unsendable(names: dict[str, object], error: Exception) -> CodecError:
    blamed = [pair for pair in names.items() if not _is_sendable(pair[1])] or list(names.items())
    path, culprit = _culprit(blamed[0][1], blamed[0][0], _SEARCH_DEPTH_MAX)
    return CodecError(
        f"cannot send {path}: a {type(culprit).__module__}.{type(culprit).__qualname__} cannot be pickled "
        f"({type(error).__name__}: {error}); send plain data and build it inside the function"
    )


def _culprit(value: object, path: str, depth: int) -> tuple[str, object]:
    if depth:
        for step, child in _children(value):
            if not _is_sendable(child):
                return _culprit(child, path + step, depth - 1)
    return path, value


def _is_sendable(value: object) -> bool:
    try:
        dumps(value)
    except Exception:  # as in encode_pickle: any answer but a pickle means no
        return False
    return True


def _children(value: object) -> Iterator[tuple[str, object]]:
    """(how to write it, part) of containers, objects and what a function closes over or refers to."""
    if isinstance(value, dict):
        pairs: Iterable[tuple[str, object]] = ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        pairs = ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, types.FunctionType):
        pairs = _variables(value)
    else:
        pairs = ((f".{key}", item) for key, item in getattr(value, "__dict__", {}).items())
    for count, pair in enumerate(pairs):
        if count >= _SEARCH_WIDTH_MAX:
            return
        yield pair


def _variables(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield f" (its variable {name})", cell.cell_contents
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield f" (its global {name})", function.__globals__[name]
