"""A client's function table: what each index stands for, decoded at its first call.

Decoding runs the tenant's code (imports, `__reduce__`), so it happens inside the first call, where its errors
have a caller to go to and can be interrupted. A function that cannot be loaded answers every call with the
same error.
Not here: how a result travels (`serving.py`), streams (`streams.py`).
"""

import asyncio
import inspect
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

from isthmus.core.errors import FunctionLoadError
from isthmus.fabric.channels import Buffer
from isthmus.fabric.codec import FunctionHeader, decode_function
from isthmus.fabric.natives import NativeFunction

ENTER, EXIT = "__isthmus_enter__", "__isthmus_exit__"  # set on methods by the sdk's decorators
COUNTED = (
    "__isthmus_counted__"  # of a callable that runs a function many times: (times, errors) of its last call
)

Context = Callable[[], Any]
Stream = Iterator[Any] | AsyncGenerator[Any, None]


class Loop:
    """The executor's one asyncio event loop: it stands still between calls and lives on until the end."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(self._task)
        finally:
            self._task = None

    def interrupt(self) -> bool:
        """Cancel the running coroutine from a signal handler. False: none runs."""
        if self._task is None or self._loop is None:
            return False
        self._loop.call_soon_threadsafe(self._task.cancel)
        return True

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()


class Function:
    """One entry of the table.

    target   what a plain function's call invokes, once loaded; None for every other kind
    context  gives the first argument of a group's function
    native   a C function: the domain answers its calls, except those that came with its definition
    row      first word of its counters on the lease page
    hold     told +1 when an actor is made, and -1 when it is gone
    """

    __slots__ = (
        "_code",
        "_context",
        "_counted",
        "_error",
        "_hold",
        "_instance",
        "_loaded",
        "_loop",
        "header",
        "native",
        "row",
        "target",
    )

    def __init__(
        self,
        header: FunctionHeader,
        code: Buffer,
        row: int,
        loop: Loop,
        context: Context | None = None,
        hold: Callable[[int], None] = lambda change: None,
    ) -> None:
        self.header = header
        self._hold = hold
        self._context = context
        self.row = row
        self.native: NativeFunction | None = None
        self.target: Callable[..., Any] | None = None
        self._code: Buffer | None = code
        self._loaded: Any = None
        self._counted = False  # whether it tells how often its last call ran a function
        self._error: FunctionLoadError | None = None
        self._instance: Any = None
        self._loop = loop

    @classmethod
    def broken(cls, header: FunctionHeader, error: FunctionLoadError, row: int, loop: Loop) -> "Function":
        """One whose every call raises this."""
        function = cls(header, b"", row, loop)
        function._error = error
        return function

    def invoke(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run one call of any kind. A stream comes back as its iterator; a coroutine has been run to
        its end.
        """
        if self._loaded is None:
            self._load()
        if self.header.kind == "actor":
            return self._settle(self._invoke_method(*args, **kwargs))
        if self._context is not None:
            args = (self._context(), *args)
        return self._settle(self._loaded(*args, **kwargs))

    def counted(self, raised: bool) -> tuple[int, int]:
        """(executions, errors) of the call that has just ended; one that raised is both."""
        if not self._counted:
            return 1, int(raised)
        times, errors = getattr(self._loaded, COUNTED)
        setattr(self._loaded, COUNTED, (0, 0))  # the next one may fail before it begins
        return times + raised, errors + raised

    @property
    def streams(self) -> bool:
        return self.header.kind in ("generator", "asyncgen", "actor")

    def leave(self) -> None:
        """Run an actor's exit methods, once. What they raise goes to the lease's log."""
        instance, self._instance = self._instance, None
        if instance is None:
            return
        self._hold(-1)
        try:
            self._run_marked(instance, EXIT)
        except (Exception, SystemExit, KeyboardInterrupt):  # a task boundary: nobody waits for an exit method
            traceback.print_exc(file=sys.stderr)

    def _load(self) -> None:
        if self._error is not None:
            raise self._error
        assert self._code is not None
        try:
            self._loaded = decode_function(bytes(self._code))
        except FunctionLoadError as error:
            self._error = error
            raise
        self._code = None
        # Asked of the type, and of no code of the user's: a proxy has every attribute that one asks it for.
        self._counted = inspect.getattr_static(type(self._loaded), COUNTED, None) is not None
        if self.header.kind == "function" and self._context is None and not self._counted:
            self.target = self._loaded

    def _invoke_method(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        if method == "__init__":
            self.leave()
            instance = self._loaded(*args, **kwargs)
            self._run_marked(instance, ENTER)
            self._instance = instance
            self._hold(+1)
            return None
        if self._instance is None:
            raise RuntimeError(
                f"{self.header.name}.{method} was called before the actor was made, or after its end"
            )
        if method == "__exit__" and not hasattr(self._instance, "__exit__"):
            return self.leave()
        return getattr(self._instance, method)(*args, **kwargs)

    def _run_marked(self, instance: Any, mark: str) -> None:
        for _, method in inspect.getmembers(type(instance), lambda member: hasattr(member, mark)):
            self._settle(method(instance))

    def _settle(self, result: Any) -> Any:
        return self._loop.run(result) if type(result) is CoroutineType else result


def is_stream(result: Any) -> bool:
    return isinstance(result, GeneratorType | AsyncGeneratorType | Iterator)
