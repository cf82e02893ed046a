"""Functions with a C interface, called without the native domain: by ctypes.

    int32_t symbol(const void *arguments, uint64_t arguments_bytes, void *result, uint64_t *result_bytes)

`*result_bytes` holds the capacity on entry and the length on return; a return other than 0 is an error code.
"""

import ctypes
import time

from isthmus.core.errors import CodecError, FunctionLoadError, RemoteError
from isthmus.fabric.channels import Frame, Meter
from isthmus.fabric.codec import Encoded, encode_words
from isthmus.fabric.frames import Kind

RESULT_BYTES_MAX = 2**30
_SIGNATURE = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)
)


class NativeFunction:
    """A loaded symbol. It runs without the GIL; nothing guards this process against what it does."""

    def __init__(self, library: str, symbol: str, result_bytes_max: int, meter: Meter | None = None) -> None:
        """Raises FunctionLoadError when library or symbol is missing, or the result may be too large."""
        if not 0 <= result_bytes_max <= RESULT_BYTES_MAX:
            raise FunctionLoadError(
                f"result_bytes_max={result_bytes_max} must be between 0 and {RESULT_BYTES_MAX}"
            )
        try:
            self._function = _SIGNATURE((symbol, ctypes.CDLL(library)))
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise FunctionLoadError(f"no function {symbol!r} in {library!r}: {error}") from error
        self._symbol = symbol
        self._result_bytes_max = result_bytes_max
        self._meter = meter

    def answer_metered(self, call: Frame) -> tuple[Kind, Encoded]:
        """`answer`, counted."""
        if self._meter is None:
            return self.answer(call)
        row, running = self._meter
        started_ns = time.monotonic_ns()
        outer, running[0] = running[0], 1
        try:
            kind, encoded = self.answer(call)
        finally:
            running[0] = outer  # other code may run around this poll
        ended_ns = time.monotonic_ns()
        row[0] += 1
        row[1] += kind == Kind.ERROR
        row[2] += ended_ns - started_ns
        row[3] = ended_ns
        return kind, encoded

    def answer(self, call: Frame) -> tuple[Kind, Encoded]:
        """Run it on the call's raw bytes: `meta` if there is no `data`, else `data`."""
        arguments = _address_of(call.meta if call.data is None else call.data)
        capacity = self._result_bytes_max
        result = ctypes.create_string_buffer(max(capacity, 1))
        result_bytes = ctypes.c_uint64(capacity)
        code = self._function(ctypes.byref(arguments), len(arguments), result, ctypes.byref(result_bytes))
        if code != 0:
            return Kind.ERROR, failure(self._symbol, code)
        if result_bytes.value > capacity:
            message = (
                f"{self._symbol} claims {result_bytes.value} bytes of result, result_bytes_max is {capacity}"
            )
            return Kind.ERROR, encode_words(CodecError, message)
        return Kind.RESULT, Encoded(ctypes.string_at(result, result_bytes.value), ())


def failure(symbol: str, code: int) -> Encoded:
    """What a caller gets for a return other than 0."""
    return encode_words(RemoteError, f"native function {symbol} returned error code {code}")


def _address_of(data: bytes | memoryview) -> "ctypes.Array[ctypes.c_char]":
    """A C array on the same memory; a copy where it is read-only, to which ctypes cannot point."""
    kind = ctypes.c_char * len(data)
    if isinstance(data, memoryview) and not data.readonly and len(data):
        return kind.from_buffer(data)
    return kind.from_buffer_copy(data)
