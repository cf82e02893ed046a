"""`isthmus.Executor`: a true `concurrent.futures.Executor` whose workers are leased executors.

It behaves like a process pool: `sys.exit` in a function is the function's exception, a worker that dies
breaks the pool, dropping the Executor lets what was submitted end. An evicted lease does not break it: the
call runs elsewhere. Not here: how calls are scheduled (`dispatch.py`).
"""

import concurrent.futures
import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures._base import LOGGER
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from isthmus.core.errors import CodecError, ExecutorLostError
from isthmus.core.model import Resources
from isthmus.sdk.carriers import InitializerFailed, Pooled
from isthmus.sdk.function import FunctionSpec
from isthmus.sdk.futures import Future
from isthmus.sdk.site import Site

T = TypeVar("T")

_instances = itertools.count(1)
_living: "weakref.WeakSet[Executor]" = weakref.WeakSet()


class BrokenExecutor(ExecutorLostError, BrokenProcessPool):
    """A worker died while it ran a call, or its initializer failed: the whole pool is unusable from then
    on.
    """


class Executor(concurrent.futures.Executor):
    """At most `max_workers` leases of `resources` each; fewer where the site has no more to give.

    site         whose leases to use; None opens one of its own, which ends with this executor
    initializer  runs once in each worker before its first call
    mp_context   accepted for drop-in use and ignored: workers are not children of this process
    """

    def __init__(
        self, max_workers: int | None = None, site: Site | None = None, *, resources: Resources | None = None,
        initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = (),
        mp_context: object = None,
    ) -> None:  # fmt: skip
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        self._max_workers = max_workers or len(os.sched_getaffinity(0))
        self._owns_site = site is None
        self._site = site or _connect()
        self._setup = (initializer, initargs)
        self._spec = FunctionSpec(resources=resources or Resources())
        self._pool = self._site.private_pool(f"executor/{next(_instances)}", self._spec, self._max_workers)
        self._broken: BrokenExecutor | None = None
        self._shut = False
        self._lock = threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._dropped = weakref.finalize(self, self._site.drop_pool_after_use, self._pool)
        self._dropped.atexit = False
        _living.add(self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        with self._lock:
            if self._broken is not None:
                raise BrokenExecutor(str(self._broken))
            if self._shut or _interpreter_ends:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future: Future[T] = _Pending(self)
            try:
                self._site.start_pooled(Pooled, (fn, *self._setup), self._pool, (args, kwargs), future)
            except CodecError as error:
                future.set_exception(error.__cause__ or error)
                return future
            self._pending.add(future)
        future.add_done_callback(functools.partial(_ended, weakref.ref(self)))
        return future

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int = 1, **options: Any,
    ) -> Iterator[T]:  # fmt: skip
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if chunksize == 1:
            return super().map(fn, *iterables, timeout=timeout, **options)
        rows = zip(*iterables, strict=False)
        chunks = iter(lambda: list(itertools.islice(rows, chunksize)), [])
        results = super().map(functools.partial(_run_rows, fn), chunks, timeout=timeout, **options)
        return itertools.chain.from_iterable(results)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            self._shut = True
        if cancel_futures:
            for future in self._site.cancel_queued(self._pool):
                future.settle_cancelled()
        if wait:
            self._await_pending()
            if self._dropped.detach() is not None:
                self._site.drop_pool(self._pool)
                if self._owns_site:
                    self._site.close()
        else:
            self._dropped()

    def abort(self) -> None:
        """Cancel everything, running calls too, and shut down."""
        with self._lock:
            self._shut = True
            pending = list(self._pending)
        for future in pending:
            future.cancel()
        self.shutdown(wait=True)

    def _await_pending(self) -> None:
        while True:
            with self._lock:
                future = next(iter(self._pending), None)
            if future is None:
                return
            future.await_end()
            with self._lock:
                self._pending.discard(future)

    def _break(self, cause: BaseException) -> None:
        """Every call of a broken pool fails, as in a process pool."""
        with self._lock:
            if self._broken is not None:
                return
            self._broken = BrokenExecutor(str(cause))
        self._site.break_pool(self._pool, self._broken)


class _Pending(Future[T]):
    """A future of an Executor: what ends its worker ends the pool."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor._site.driver)
        self._executor = weakref.ref(executor)

    def set_exception(self, exception: BaseException | None) -> None:
        executor = self._executor()
        if isinstance(exception, ExecutorLostError | InitializerFailed) and not isinstance(
            exception, BrokenExecutor
        ):
            if isinstance(exception, InitializerFailed):
                LOGGER.critical("Exception in initializer:", exc_info=exception)
            broken = BrokenExecutor(str(exception))
            broken.__cause__ = exception
            super().set_exception(broken)
            if executor is not None:
                executor._break(exception)
        else:
            super().set_exception(exception)


def _ended(reference: "weakref.ref[Executor]", future: concurrent.futures.Future[Any]) -> None:
    executor = reference()
    if executor is not None and isinstance(future, Future):
        executor._pending.discard(future)


def _run_rows(fn: Callable[..., T], rows: list[tuple[Any, ...]]) -> list[T]:
    return [fn(*row) for row in rows]


def _connect() -> Site:
    from isthmus.sdk.connecting import connect

    return connect()


_interpreter_ends = False


def _shut_all() -> None:
    """What was submitted ends before the interpreter does, as with CPython's own executors."""
    global _interpreter_ends
    _interpreter_ends = True
    for executor in list(_living):
        executor.shutdown(wait=True)


# Before threads are joined, not by `atexit`, which runs later: a waiting thread may need our results to end.
threading._register_atexit(_shut_all)  # type: ignore[attr-defined]
