"""What runs on an executor around the user's function: for callables that travel as arguments, and for
chunks.

Small on purpose: every executor imports this module with its first such call.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from isthmus.fabric import codec


def apply(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs on the executor: call a callable that came as an argument."""
    return fn(*args, **kwargs)


async def apply_async(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return await fn(*args, **kwargs)


def apply_generator(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return (yield from fn(*args, **kwargs))


async def apply_asyncgen(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    async for item in fn(*args, **kwargs):
        yield item


CARRIERS: dict[str, Callable[..., Any]] = {
    "function": apply,
    "async": apply_async,
    "generator": apply_generator,
    "asyncgen": apply_asyncgen,
}


class Failed(NamedTuple):
    """An item's exception, as `codec.encode_error` wrote it; travels inside a chunk's result."""

    meta: bytes
    data: bytes


class Chunk:
    """Runs on the executor: `fn` over rows of arguments; gives (seconds spent, outcomes).

    __isthmus_counted__  (executions, errors) of the last call, for whoever counts them there; a row that was
                         interrupted is not among them
    """

    __isthmus_counted__ = (0, 0)

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *rows: tuple[Any, ...]) -> tuple[float, list[Any]]:
        fn, outcomes, failures = self.fn, [], 0
        began_s = time.perf_counter()
        try:
            for row in rows:
                try:
                    outcomes.append(fn(*row))
                except Exception as error:  # a task boundary: the caller gets it as this item's outcome
                    meta, data = codec.encode_error(error)
                    outcomes.append(Failed(bytes(meta), bytes(codec.join(data))))
                    failures += 1
        finally:
            self.__isthmus_counted__ = len(outcomes), failures
        return time.perf_counter() - began_s, outcomes


class InitializerFailed(Exception):
    """Raised in place of a call's own outcome when its worker could not be initialised."""


class Pooled:
    """A function as a process pool runs it: after the worker's initializer, and with `sys.exit` as an
    exception.
    """

    _initialised = False

    def __init__(
        self, fn: Callable[..., Any], initializer: Callable[..., object] | None, initargs: tuple[Any, ...]
    ) -> None:
        self.fn, self.initializer, self.initargs = fn, initializer, initargs

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if self.initializer is not None and not Pooled._initialised:
            try:
                self.initializer(*self.initargs)
            except BaseException as error:
                raise InitializerFailed(f"the initializer raised {type(error).__name__}: {error}") from error
            Pooled._initialised = True
        try:
            return self.fn(*args, **kwargs)
        except SystemExit as error:
            raise _Exit(error.code) from error


class _Exit(Exception):
    """Carries SystemExit past the executor, for which it would mean to end."""

    def __reduce__(self) -> tuple[Any, ...]:
        return SystemExit, self.args
