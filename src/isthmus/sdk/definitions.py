"""Functions as they travel: shipped once per channel, called by number from then on.

Invariants: the same code has the same number everywhere in this client; the table is bounded, because only
plain functions and classes are entered and everything else travels as an argument of a carrier
(`carriers.py`). Not here: what an executor does with them (`isthmus.node`).
"""

import hashlib
import inspect
import itertools
import threading
import types
from typing import Any, NamedTuple

from isthmus.fabric import codec
from isthmus.sdk.carriers import CARRIERS
from isthmus.sdk.function import NativeFunction

DEFINITIONS_MAX = 2048  # distinct functions one client ships; beyond it they travel as arguments

PLAIN = (types.FunctionType, types.BuiltinFunctionType, type)


class Definition(NamedTuple):
    """What DEFINE carries. `number` is the function_id of its CALLs; `needs` must be defined before it."""

    number: int
    name: str
    kind: str
    meta: bytes
    code: bytes
    needs: "Definition | None" = None


class Definitions:
    """The client's table of functions."""

    def __init__(self) -> None:
        self._by_digest: dict[str, Definition] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def of(self, fn: Any) -> Definition | None:
        """The definition of a plain function, or None when `fn` must travel as an argument of a carrier."""
        if isinstance(fn, NativeFunction):
            return self._native(fn)
        if not isinstance(fn, PLAIN) or (
            len(self._by_digest) >= DEFINITIONS_MAX and fn not in CARRIERS.values()
        ):
            return None
        code, kind = codec.encode_function(fn), kind_of(fn)
        header = codec.FunctionHeader(name=name_of(fn), kind=kind, digest=_digest(code, kind))
        return self._enter(header, code)

    def of_chunk(self, chunk: Any, name: str) -> Definition | None:
        """A callable made for one function of that name (`carriers.Chunk`); None when the table is full."""
        if len(self._by_digest) >= DEFINITIONS_MAX:
            return None
        code = codec.encode_function(chunk)
        return self._enter(
            codec.FunctionHeader(name=name, kind="function", digest=_digest(code, "chunk")), code
        )

    def of_actor(self, cls: Any, instance: int) -> Definition:
        """A number of its own for each instance: `__init__` makes one instance per function_id."""
        code = codec.encode_function(cls)
        header = codec.FunctionHeader(
            name=name_of(cls), kind="actor", digest=_digest(code, f"actor{instance}")
        )
        return Definition(next(self._numbers), header.name, "actor", codec.encode_header(header), code)

    def of_member(self, fn: Any, table: codec.GroupTable) -> Definition:
        """The function as one member of a group runs it; not entered, because the group ends with its
        call.
        """
        group, number = next(self._numbers), next(self._numbers)
        about = codec.encode_header(codec.FunctionHeader(name=table.group, kind="group"))
        needs = Definition(group, table.group, "group", about, codec.encode_group(table))
        header = codec.FunctionHeader(name=name_of(fn), kind=kind_of(fn), group=group)
        return Definition(
            number, header.name, header.kind, codec.encode_header(header), codec.encode_function(fn), needs
        )

    def _native(self, fn: NativeFunction) -> Definition:
        digest = _digest(f"{fn.library}\0{fn.symbol}\0{fn.result_bytes_max}".encode(), "native")
        header = codec.FunctionHeader(
            name=fn.symbol, kind="native", digest=digest,
            library=fn.library, symbol=fn.symbol, result_bytes_max=fn.result_bytes_max,
        )  # fmt: skip
        return self._enter(header, b"")

    def _enter(self, header: codec.FunctionHeader, code: bytes) -> Definition:
        with self._lock:
            known = self._by_digest.get(header.digest)
            if known is None:
                number, meta = next(self._numbers), codec.encode_header(header)
                known = Definition(number, header.name, header.kind, meta, code)
                self._by_digest[header.digest] = known
            return known


def kind_of(fn: Any) -> codec.FunctionKind:
    """How a call of it runs. A class is called like a function; `of_actor` makes it an actor."""
    if inspect.isasyncgenfunction(fn):
        return "asyncgen"
    if inspect.isgeneratorfunction(fn):
        return "generator"
    return "async" if inspect.iscoroutinefunction(fn) else "function"


def name_of(fn: Any) -> str:
    module = getattr(fn, "__module__", None) or ""
    name = getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or type(fn).__name__
    return f"{module}.{name}" if module else str(name)


def _digest(code: bytes, kind: str) -> str:
    return hashlib.blake2b(code, digest_size=16, person=kind.encode()[:16]).hexdigest()
