"""Run a function over many items: chunked, as many at once as there are executors, lazily, in bounded memory.

Short items travel many to a call, so that a chunk takes about CHUNK_S; a chunk is one call of `Chunk(fn)`.
Invariants: every item is submitted once; at most `_window` chunks are under way or waiting to be taken; a
consumer that stops early cancels the rest. Functions with retries or a timeout are not chunked: both are
meant per item.
"""

import concurrent.futures
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

from isthmus.core.errors import CodecError, InvalidRequestError, MapError
from isthmus.fabric import codec
from isthmus.sdk.calls import Plan
from isthmus.sdk.carriers import Failed
from isthmus.sdk.futures import Future

CHUNK_S = 0.01  # aim of one chunk; longer balances worse at the end, shorter costs more calls
CHUNK_ITEMS_MAX = 4096
CHUNKS_PER_EXECUTOR = 8  # under way for each executor: enough to show the pool that it should grow
CHUNKS_MIN = 8
FAILURES_MAX = 1000  # an endless map that keeps failing stops here


class Starter(Protocol):
    """The Site, as a map needs it."""

    def start(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]: ...
    def drive_until(
        self, done: Callable[[], bool], deadline_s: float | None, rest: Callable[[float], None]
    ) -> None: ...


@dataclass(frozen=True, kw_only=True)
class MapOptions:
    ordered: bool = True
    chunk: int | None = None
    progress: bool = False
    return_exceptions: bool = False


class _Flight(NamedTuple):
    """A chunk under way. `single`: one item by an ordinary call."""

    first: int
    items: int
    future: Future[Any]
    single: bool


class Mapping:
    def __init__(
        self, site: Starter, plan: Plan, chunk_plan: Plan | None, iterables: tuple[Iterable[Any], ...],
        options: MapOptions,
    ) -> None:  # fmt: skip
        """chunk_plan  None: this function's items travel one by one"""
        if options.chunk is not None and options.chunk < 1:
            raise InvalidRequestError(f"chunk={options.chunk}: a chunk has at least one item")
        self._site = site
        self._plan = plan
        self._chunk_plan = chunk_plan
        self._options = options
        self._rows = zip(*iterables, strict=False)
        self._total = min((operator.length_hint(one, 0) for one in iterables), default=0) or None
        self._submitted = 0
        self._exhausted = False
        self._item_s = 0.0
        self._flights: deque[_Flight] = deque()
        self._ended: deque[_Flight] = deque()
        self._failures: list[tuple[int, BaseException]] = []

    def run(self) -> Iterator[Any]:
        with self._bar() as advance:
            try:
                self._fill()
                while self._flights:
                    flight = self._next_flight()
                    outcomes = self._outcomes(flight)
                    self._fill()
                    for index, outcome in enumerate(outcomes, flight.first):
                        advance(1)
                        if not isinstance(outcome, _Raised) or self._options.return_exceptions:
                            yield outcome.error if isinstance(outcome, _Raised) else outcome
                        else:
                            self._fail(index, outcome.error)
            finally:
                for flight in self._flights:
                    flight.future.cancel()
        if self._failures:
            raise _map_error(self._failures, self._submitted)

    # sending ------------------------------------------------------------------------
    def _fill(self) -> None:
        executors = max(len(self._plan.pool.executors), 1)
        while not self._exhausted and len(self._flights) < CHUNKS_MIN + CHUNKS_PER_EXECUTOR * executors:
            rows = list(islice(self._rows, self._chunk_items(executors)))
            if not rows:
                self._exhausted = True
                return
            self._send(rows)

    def _chunk_items(self, executors: int) -> int:
        if self._chunk_plan is None:
            return 1
        if self._options.chunk is not None:
            return self._options.chunk
        if not self._item_s:
            return 1
        items = min(int(CHUNK_S / self._item_s), CHUNK_ITEMS_MAX)
        if self._total is not None:  # leave enough chunks for all to finish together
            items = min(items, (self._total - self._submitted) // (4 * executors))
        return max(items, 1)

    def _send(self, rows: list[tuple[Any, ...]]) -> None:
        if len(rows) > 1 and self._chunk_plan is not None:
            try:
                future = self._site.start(self._chunk_plan, tuple(rows), {})
            except CodecError:
                for row in rows:  # find the one that cannot travel; the others can
                    self._send_one(row)
                return
            self._launch(_Flight(self._submitted, len(rows), future, single=False))
        else:
            for row in rows:
                self._send_one(row)

    def _send_one(self, row: tuple[Any, ...]) -> None:
        plan = self._chunk_plan or self._plan
        args = (row,) if self._chunk_plan is not None else row
        try:
            future = self._site.start(plan, args, {})
        except CodecError as error:
            future = Future()
            future.set_exception(error)
        self._launch(_Flight(self._submitted, 1, future, single=self._chunk_plan is None))

    def _launch(self, flight: _Flight) -> None:
        self._submitted += flight.items
        self._flights.append(flight)
        if not self._options.ordered:
            flight.future.add_done_callback(lambda _: self._ended.append(flight))

    # receiving ------------------------------------------------------------------------
    def _next_flight(self) -> _Flight:
        if self._options.ordered:
            return self._flights.popleft()
        if not self._ended:
            self._site.drive_until(lambda: bool(self._ended), None, self._rest)
        flight = self._ended.popleft()
        self._flights.remove(flight)
        return flight

    def _rest(self, duration_s: float) -> None:
        futures = [flight.future for flight in self._flights]
        concurrent.futures.wait(futures, duration_s, concurrent.futures.FIRST_COMPLETED)

    def _outcomes(self, flight: _Flight) -> list[Any]:
        error = flight.future.exception()
        if error is not None:
            return [_Raised(error)] * flight.items
        value = flight.future.result()
        if flight.single:
            return [value]
        busy_s, outcomes = value
        sample_s = max(busy_s / flight.items, 1e-7)
        self._item_s = sample_s if not self._item_s else 0.7 * self._item_s + 0.3 * sample_s
        return [_raised(one) if isinstance(one, Failed) else one for one in outcomes]

    def _fail(self, index: int, error: BaseException) -> None:
        self._failures.append((index, error))
        if len(self._failures) >= FAILURES_MAX:
            raise _map_error(self._failures, self._submitted)

    def _bar(self) -> AbstractContextManager[Callable[[int], None]]:
        if not self._options.progress:
            return nullcontext(lambda _: None)
        from isthmus.sdk.bars import Bar

        return Bar(self._plan.definition.name, self._total)


class _Raised(NamedTuple):
    error: BaseException


def _raised(failed: Failed) -> _Raised:
    return _Raised(codec.decode_error(failed.meta, memoryview(failed.data)))


def _map_error(failures: list[tuple[int, BaseException]], submitted: int) -> MapError:
    index, first = failures[0]
    error = MapError(
        f"{len(failures)} of {submitted} items failed; the first was item {index}: "
        f"{type(first).__name__}: {first}",
        tuple(failures),
    )
    error.__cause__ = first
    return error
