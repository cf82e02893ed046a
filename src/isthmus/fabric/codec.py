"""Values, calls, exceptions and functions to frames and back.

Exactness first: what arrives has the types and values of what was sent. The first byte of `meta` names the
layout:

    PLAIN, TREE, ARRAY    msgpack and raw buffers (`_trees`): small builtin values, NumPy arrays, bytes
    PICKLE                cloudpickle with out-of-band buffers (`_pickles`): everything else
    EXCEPTION, WORDS      what a function raised (`_exceptions`)

A call is encoded as the pair (args, kwargs). Decoded arrays are views on the received data: nothing is
copied. The codec keeps no reference to what it encoded, but `Encoded.data` does: do not change large
arguments in flight. The functions of the shortest path (`pack_*`, `decode_*`) have native shortcuts for small
builtin values (`native/plain.cpp`), which leave everything else to them.
Not here: how bytes travel (`channels`), and who may decode them (executors and clients only; never the site).
"""

import inspect
import pickle
from collections.abc import Callable
from typing import Any, Literal, cast

import cloudpickle  # type: ignore[import-untyped]
import msgspec

from isthmus.core.errors import CodecError, FunctionLoadError
from isthmus.fabric import _shortcuts as shortcuts
from isthmus.fabric._buffers import INLINE_BYTES_MAX, Buffer, Encoded, Region, join
from isthmus.fabric._exceptions import (
    EXCEPTION,
    WORDS,
    RemoteTraceback,
    decode_exception,
    decode_words,
    encode_error,
    encode_words,
)
from isthmus.fabric._pickles import PICKLE, decode_pickle, encode_pickle
from isthmus.fabric._trees import (
    ARRAY,
    ATOMS,
    PLAIN,
    TREE,
    NotATree,
    decode_array,
    decode_plain,
    decode_plain_call,
    decode_tree,
    encode_array,
    encode_plain,
    encode_tree,
    is_array_type,
    is_flat,
)

FunctionKind = Literal["function", "async", "generator", "asyncgen", "actor", "native", "group"]

_PLAIN, _TREE, _ARRAY, _PICKLE = PLAIN[0], TREE[0], ARRAY[0], PICKLE[0]
_NONE = encode_plain(None)
_write = msgspec.msgpack.Encoder().encode

Packed = tuple[bytes, tuple[Buffer, ...]]  # an Encoded, or the bare pair: a tenth of a microsecond less


class FunctionHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The meta of a DEFINE frame. `digest` names the code.

    library, symbol, result_bytes_max  of native functions
    group  table index of the group (a DEFINE of kind "group", sent before) whose `collectives.Group` the
           function gets as its first argument; 0: none
    """

    name: str
    kind: FunctionKind = "function"
    digest: str = ""
    library: str = ""
    symbol: str = ""
    result_bytes_max: int = 0
    group: int = 0


class GroupTable(msgspec.Struct, frozen=True, kw_only=True):
    """The data of a DEFINE of kind "group": its members; `collectives.Group(domain, table)` is made of it.

    group  the same for all members, and for no other group
    rank   the receiver's own
    peers  (address, lease token) by rank; peers connect with Hello.role "peer" and their rank
    """

    group: str
    rank: int
    peers: tuple[tuple[str, str], ...]


_header = msgspec.msgpack.Decoder(FunctionHeader)
_group = msgspec.msgpack.Decoder(GroupTable)


# calls ------------------------------------------------------------------------------------------------------
def encode_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Encoded:
    """Raises CodecError, naming the argument, when one cannot be pickled."""
    try:
        if is_flat(args) and (not kwargs or is_flat(kwargs.values())):
            return encode_plain((args, kwargs))
        if len(args) == 1 and not kwargs and is_array_type(type(args[0])):
            return encode_array(args[0])
        return encode_tree([list(args), kwargs])
    except NotATree:
        return encode_pickle((args, kwargs), {"args": args, "kwargs": kwargs})


@shortcuts.pack_call
def pack_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Packed:
    """`encode_call` for the shortest path: small positional values are looked at once and named nothing."""
    if not kwargs:
        for value in args:
            kind = type(value)
            if kind in ATOMS or ((kind is bytes or kind is str) and len(value) <= INLINE_BYTES_MAX):
                continue
            return encode_call(args, kwargs)
        try:
            return PLAIN + _write((args, kwargs)), ()
        except (OverflowError, UnicodeEncodeError):  # an int beyond 64 bits, or text with a lone surrogate
            pass
    return encode_call(args, kwargs)


@shortcuts.decode_call
def decode_call(meta: Buffer, data: Buffer | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments. Raises CodecError."""
    if meta and meta[0] == _PLAIN:
        return decode_plain_call(meta[1:])
    value = decode_value(meta, data)
    if meta[0] == _ARRAY:
        return (value,), {}
    try:
        args, kwargs = value
        if type(kwargs) is dict:
            return tuple(args), kwargs
    except (TypeError, ValueError):
        pass
    raise CodecError(f"not an encoded call but a {type(value).__name__}")


# values -----------------------------------------------------------------------------------------------------
def encode_value(value: Any) -> Encoded:
    """Raises CodecError, naming the part, when one cannot be pickled."""
    if value is None:
        return _NONE
    kind = type(value)
    try:
        if kind in ATOMS or ((kind is bytes or kind is str) and len(value) <= INLINE_BYTES_MAX):
            return encode_plain(value)
        if is_array_type(kind):
            return encode_array(value)
        return encode_tree(value)
    except NotATree:
        return encode_pickle(value, {"the result": value})


@shortcuts.pack_value
def pack_value(value: Any) -> Packed:
    """`encode_value` for the shortest path."""
    kind = type(value)
    if kind in ATOMS or ((kind is bytes or kind is str) and len(value) <= INLINE_BYTES_MAX):
        try:
            return PLAIN + _write(value), ()
        except (OverflowError, UnicodeEncodeError):
            pass
    return encode_value(value)


@shortcuts.decode_value
def decode_value(meta: Buffer, data: Buffer | None) -> Any:
    """Raises CodecError. Runs the sender's code if the layout is PICKLE."""
    layout = meta[0] if meta else 0
    if layout == _PLAIN:
        return decode_plain(meta[1:])
    if layout == _ARRAY:
        return decode_array(meta[1:], Region(data))
    if layout == _TREE:
        return decode_tree(meta[1:], Region(data))
    if layout == _PICKLE:
        return decode_pickle(meta[1:], Region(data))
    raise CodecError(f"layout {layout} is no value; both sides need the same isthmus version")


# exceptions -------------------------------------------------------------------------------------------------
def decode_error(meta: Buffer, data: Buffer | None) -> BaseException:
    """The exception itself with the remote traceback as its __cause__, or RemoteError. Raises CodecError."""
    layout = bytes(meta[:1])
    if layout == EXCEPTION:
        return decode_exception(meta[1:], Region(data))
    if layout == WORDS:
        return decode_words(bytes(meta[1:]))
    raise CodecError(f"layout {layout!r} is no exception; both sides need the same isthmus version")


# functions --------------------------------------------------------------------------------------------------
def function_kind(function: Callable[..., Any] | type) -> FunctionKind:
    if inspect.isclass(function):
        return "actor"
    if inspect.isasyncgenfunction(function):
        return "asyncgen"
    if inspect.isgeneratorfunction(function):
        return "generator"
    return "async" if inspect.iscoroutinefunction(function) else "function"


def encode_function(function: Callable[..., Any] | type) -> bytes:
    """Its code, or its name if it lies in a module that can be imported. Raises CodecError."""
    try:
        return cast(bytes, cloudpickle.dumps(function, protocol=5))
    except Exception:
        name = f"function {getattr(function, '__qualname__', function)}"
        encode_pickle(function, {name: function})  # finds the culprit and raises
        raise


def decode_function(code: Buffer) -> Callable[..., Any]:
    """Raises FunctionLoadError, naming the missing module."""
    try:
        function = pickle.loads(code)
    except ModuleNotFoundError as error:
        raise FunctionLoadError(
            f"the function needs module {error.name!r}, which the executor does not have; name it in "
            "requirements=, or make it importable there"
        ) from error
    except Exception as error:  # importing and rebuilding run the user's code, which raises what it likes
        raise FunctionLoadError(f"the function cannot be rebuilt: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise FunctionLoadError(f"a {type(function).__name__} was sent in place of a function")
    return function  # type: ignore[no-any-return]


def encode_group(table: GroupTable) -> bytes:
    return msgspec.msgpack.encode(table)


def decode_group(data: Buffer) -> GroupTable:
    """Raises CodecError."""
    try:
        return _group.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"not a group table: {error}") from error


def encode_header(header: FunctionHeader) -> bytes:
    return msgspec.msgpack.encode(header)


def decode_header(meta: Buffer) -> FunctionHeader:
    """Raises CodecError."""
    try:
        return _header.decode(meta)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(f"not a function header: {error}") from error


__all__ = [
    "Encoded",
    "FunctionHeader",
    "FunctionKind",
    "GroupTable",
    "Packed",
    "RemoteTraceback",
    "decode_call",
    "decode_error",
    "decode_function",
    "decode_group",
    "decode_header",
    "decode_value",
    "encode_call",
    "encode_error",
    "encode_function",
    "encode_group",
    "encode_header",
    "encode_value",
    "encode_words",
    "function_kind",
    "join",
    "pack_call",
    "pack_value",
]
