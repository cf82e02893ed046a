"""What a function asks of the place it runs: the decorators that attach it, and how it is read back.

Invariant: decorating changes nothing about calling. `embed("hi")` still runs here; only `site.call(embed,
"hi")` and its sisters run elsewhere, so that a reader sees at the call where it happens.
Not here: how a function travels (`definitions.py`).
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, TypeVar, overload

from isthmus.core.model import Environment, LeaseClass, Resources

SPEC_ATTRIBUTE = "__isthmus_spec__"
ENTER_ATTRIBUTE = "__isthmus_enter__"
EXIT_ATTRIBUTE = "__isthmus_exit__"
LIMIT_S_MAX = 366 * 86400.0  # of timeout_s and backoff_s: further off than any lease lives

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

    def __post_init__(self) -> None:
        if not isinstance(self.max, int) or self.max < 0:
            raise ValueError(f"Retry(max={self.max!r}): a number of retries is a whole number, 0 or more")
        _check_s("backoff_s", self.backoff_s, "0 or more", 0.0 <= _number(self.backoff_s) <= LIMIT_S_MAX)
        if not isinstance(self.on, tuple) or not all(map(_is_exception, self.on)):
            raise ValueError(f"Retry(on={self.on!r}): name exception types in a tuple, like on=(OSError,)")


_KINDS: dict[str, Any] = {
    "resources": Resources, "policy": str, "environment": Environment | None, "retries": Retry,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FunctionSpec:
    """What `@isthmus.function(...)` attaches to a function.

    timeout_s  from the call until its result, > 0; None: no limit
    """

    resources: Resources = field(default_factory=Resources)
    policy: str = ""
    environment: Environment | None = None
    retries: Retry = field(default_factory=Retry)
    timeout_s: float | None = None
    lease_class: LeaseClass = LeaseClass.ELASTIC

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}={value!r}: expected {getattr(kind, '__name__', 'Environment')}")
        LeaseClass(self.lease_class)
        if self.timeout_s is not None:
            _check_s("timeout_s", self.timeout_s, "more than 0", 0.0 < _number(self.timeout_s) <= LIMIT_S_MAX)


def _number(value: object) -> float:
    """NaN for what is no number, so that every comparison fails."""
    return float(value) if isinstance(value, Real) else float("nan")


def _check_s(name: str, value: object, least: str, ok: bool) -> None:
    if not ok:
        most_days = f"{LIMIT_S_MAX / 86400:.0f} days"
        raise ValueError(
            f"{name}={value!r}: expected seconds, {least} and at most {most_days}; or leave it out"
        )


def _is_exception(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException)


NO_RETRY = Retry()
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
    elif fn is not None and not callable(fn):
        raise TypeError(f"isthmus.function({fn!r}): expected a function or isthmus.Resources(...)")
    spec = _spec(options)
    if fn is not None and not isinstance(fn, Resources):
        return _attach(fn, spec)
    return lambda target: _attach(target, spec)


def _spec(options: dict[str, Any]) -> FunctionSpec:
    known = [option.name for option in fields(FunctionSpec)]
    for name, value in options.items():
        if name in Resources.__struct_fields__:
            raise TypeError(f"no option {name!r}: it belongs to resources, Resources({name}={value!r})")
        if name not in known:
            raise TypeError(f"no option {name!r}; there are {', '.join(known)}")
    return FunctionSpec(**options)


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
    try:
        setattr(target, SPEC_ATTRIBUTE, spec)
    except (AttributeError, TypeError) as error:
        name = getattr(target, "__qualname__", repr(target))
        raise TypeError(
            f"{name} is built in or a bound method, so nothing can be attached to it; decorate a function "
            "that calls it, or pass it to site.call as it is"
        ) from error
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
