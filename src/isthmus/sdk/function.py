"""What a function asks of the place it runs: the decorators that attach it, and how it is read back.

Invariant: decorating changes nothing about calling. `embed("hi")` still runs here; only `site.call(embed,
"hi")` and its sisters run elsewhere, so that a reader sees at the call where it happens.
Not here: how a function travels (`definitions.py`).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

from isthmus.core.model import Environment, LeaseClass, Resources

SPEC_ATTRIBUTE = "__isthmus_spec__"
ENTER_ATTRIBUTE = "__isthmus_enter__"
EXIT_ATTRIBUTE = "__isthmus_exit__"

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a failed call is tried again: at most `max` times, on these exceptions, waiting longer each time.

    backoff_s  before the first retry; doubles with each further one, at most RETRY_BACKOFF_S_MAX
    on         exception types; losing the executor (ExecutorLostError) counts, an eviction never does
    """

    max: int = 0
    backoff_s: float = 0.1
    on: tuple[type[BaseException], ...] = (Exception,)


@dataclass(frozen=True, kw_only=True)
class FunctionSpec:
    """What `@isthmus.function(...)` attaches to a function."""

    resources: Resources = field(default_factory=Resources)
    policy: str = ""
    environment: Environment | None = None
    retries: Retry = field(default_factory=Retry)
    timeout_s: float | None = None
    lease_class: LeaseClass = LeaseClass.ELASTIC


DEFAULT_SPEC = FunctionSpec()


@overload
def function(fn: F, /) -> F: ...
@overload
def function(
    resources: Resources = ...,
    /,
    *,
    policy: str = ...,
    environment: Environment | None = ...,
    retries: Retry = ...,
    timeout_s: float | None = ...,
    lease_class: LeaseClass = ...,
) -> Callable[[F], F]: ...
@overload
def function(
    *,
    resources: Resources = ...,
    policy: str = ...,
    environment: Environment | None = ...,
    retries: Retry = ...,
    timeout_s: float | None = ...,
    lease_class: LeaseClass = ...,
) -> Callable[[F], F]: ...


def function(fn: Any = None, /, **options: Any) -> Any:
    """Say what a function needs: `@function`, `@function(Resources(cores=2))` or
    `@function(timeout_s=1.0)`.
    """
    if isinstance(fn, Resources):
        options["resources"] = fn
    elif fn is not None:
        return _attach(fn, FunctionSpec(**options))
    spec = FunctionSpec(**options)
    return lambda target: _attach(target, spec)


def actor(cls: Any = None, /, **options: Any) -> Any:
    """Mark a class whose instance lives in an executor of its own; takes the options of `function`."""
    return function(cls, **options)


def enter(method: F) -> F:
    """Run this method once on the executor, after the actor's `__init__`."""
    setattr(method, ENTER_ATTRIBUTE, True)
    return method


def exit(method: F) -> F:
    """Run this method once on the executor when the actor ends in order (closed, drained, SIGTERM)."""
    setattr(method, EXIT_ATTRIBUTE, True)
    return method


def spec_of(fn: object) -> FunctionSpec:
    spec = getattr(fn, SPEC_ATTRIBUTE, DEFAULT_SPEC)
    return spec if isinstance(spec, FunctionSpec) else DEFAULT_SPEC


def _attach(target: T, spec: FunctionSpec) -> T:
    setattr(target, SPEC_ATTRIBUTE, spec)
    return target


@dataclass(frozen=True)
class NativeFunction:
    """A C symbol of a shared object; calling it here runs it here, through ctypes.

    int32_t symbol(const void *arguments, uint64_t arguments_bytes, void *result, uint64_t *result_bytes)
    """

    library: str
    symbol: str
    result_bytes_max: int

    @property
    def __name__(self) -> str:
        return self.symbol

    def __call__(self, arguments: bytes = b"") -> bytes:
        result = ctypes.create_string_buffer(self.result_bytes_max)
        result_bytes = ctypes.c_uint64(self.result_bytes_max)
        call = getattr(ctypes.CDLL(self.library), self.symbol)
        call.argtypes = (ctypes.c_char_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p)
        call.restype = ctypes.c_int32
        code = call(arguments, len(arguments), result, ctypes.byref(result_bytes))
        if code != 0:
            raise RuntimeError(f"{self.symbol} in {self.library} returned {code}")
        return result.raw[: result_bytes.value]


def native(
    library: str, symbol: str, result_bytes_max: int = 65536, resources: Resources | None = None
) -> NativeFunction:
    """A C function that executors call without Python; arguments and result are raw bytes."""
    fn = NativeFunction(library, symbol, result_bytes_max)
    if resources is not None:
        object.__setattr__(fn, SPEC_ATTRIBUTE, FunctionSpec(resources=resources))
    return fn
