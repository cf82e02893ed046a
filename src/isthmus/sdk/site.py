"""A Site: the one object through which functions run elsewhere.

`call` is the shortest path and is written out in one place, because what stands between it and the fabric is
what isthmus costs. Everything else goes through the scheduler (`dispatch.py`) and its shell (`engine.py`).
Not here: maps, streams, actors, groups, durable calls (one module each).
"""

import atexit
import dataclasses
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from time import perf_counter
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from isthmus.core.api import BillRow
from isthmus.core.errors import FabricError, InvalidRequestError, PeerLostError
from isthmus.core.ids import CallId
from isthmus.core.model import Lease, LeaseClass
from isthmus.core.settings import ClientSettings
from isthmus.fabric.channels import Frame
from isthmus.fabric.frames import Kind
from isthmus.sdk import definitions, environment
from isthmus.sdk.actors import Actor
from isthmus.sdk.calls import Payload, Plan, attach_future, new_call
from isthmus.sdk.control import Control
from isthmus.sdk.durable import DurableCalls
from isthmus.sdk.engine import Engine
from isthmus.sdk.function import FunctionSpec, Retry
from isthmus.sdk.futures import Driver, Future, outcome
from isthmus.sdk.groups import GroupCall
from isthmus.sdk.latency import HOT_GAP_S, LatencyReport
from isthmus.sdk.links import TRUST_S, Link
from isthmus.sdk.mapping import MapOptions, Mapping
from isthmus.sdk.memory import Memory
from isthmus.sdk.plans import Plans
from isthmus.sdk.streaming import Inbox, Stream
from isthmus.sdk.supply import Supply
from isthmus.sdk.work import Call, Executor, Pool

P = ParamSpec("P")
R = TypeVar("R")

_RESULT = int(Kind.RESULT)
_STREAM_KINDS = ("generator", "asyncgen")
_open_sites: "weakref.WeakSet[Site]" = weakref.WeakSet()
_retiring: set[Engine] = set()  # of dropped Sites, until their last call is done


class _Dash:
    """A function bound to an executor for the shortest path."""

    __slots__ = ("call", "deadline_ns", "decode", "encode", "executor", "has_ended", "link", "number", "plan")

    def __init__(self, plan: Plan, executor: Executor, link: Link) -> None:
        self.plan = plan
        self.executor = executor
        self.link = link
        self.call, self.has_ended = link.channel.call, link.channel.has_ended
        self.number = plan.definition.number
        self.encode, self.decode = plan.encode, plan.decode
        self.deadline_ns = int(plan.spec.timeout_s * 1e9) if plan.spec.timeout_s else 0


class Site:
    """Runs functions on leased cores. Made by `isthmus.connect()`; its leases end with `close()`."""

    def __init__(
        self,
        control: Control,
        supply: Supply,
        settings: ClientSettings,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._control = control
        self._engine = Engine(supply, settings)
        self._spin_s = settings.spin_s
        self._take_baton, self._give_baton = self._engine.baton.acquire, self._engine.baton.release
        self._dashes: dict[int, _Dash] = {}
        dashes = self._dashes
        self._plans = Plans(self._engine, environment.capture(), lambda key: dashes.pop(key, None))
        self._durable = DurableCalls(control, self._engine.make_room)
        self._dropped = weakref.finalize(self, _retire, self._engine, control, on_close)
        self._dropped.atexit = False
        self._on_close = on_close
        _open_sites.add(self)

    # calling ----------------------------------------------------------------
    def call(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `fn(*args, **kwargs)` on an executor and give its value. The shortest path: microseconds when
        hot.
        """
        dash = self._dashes.get(id(fn))
        if dash is None:
            return self._call_slowly(fn, args, kwargs)
        meta, data = dash.encode(args, kwargs)
        engine, executor = self._engine, dash.executor
        if executor.inflight or not dash.link.open or engine.guests:
            return self._call_slowly(fn, args, kwargs)
        began_s = perf_counter()
        if (idle_s := began_s - executor.last_s) > TRUST_S and dash.has_ended():
            return self._call_slowly(fn, args, kwargs)
        if (engine.dashing or not self._take_baton(False)) and not engine.take_baton_to_dash():
            return self._call_slowly(fn, args, kwargs)
        engine.dashing = executor.claimed = True
        number = next(engine.numbers)
        try:
            frame = dash.call(number, dash.number, meta, data, dash.deadline_ns, self._spin_s, self._spin_s)
        except PeerLostError:
            frame = None
        except BaseException:
            _stop(dash.link, number)
            executor.claimed = False
            raise
        finally:
            engine.dashing = False
            self._give_baton()
        if frame is None or frame.kind != _RESULT:
            value: R = self._finish_slowly(dash, number, frame, Payload(dash.plan, meta, data), began_s)
            return value
        executor.claimed = False
        if executor.pool.queue:
            engine.resume(executor.pool)
        ended_s = perf_counter()
        (engine.hot if idle_s < HOT_GAP_S else engine.warm)(ended_s - began_s)
        executor.last_s = ended_s
        return dash.decode(frame.meta, frame.data)  # type: ignore[no-any-return]

    def submit(
        self, fn: Callable[..., R], /, *args: Any, durable: bool = False, idempotency_key: str = "",
        timeout_s: float | None = None, retries: Retry | None = None, **kwargs: Any,
    ) -> Future[R]:  # fmt: skip
        """Start `fn(*args, **kwargs)` on an executor and give its future.

        durable          the site keeps the call: it survives this client and is run at least once; see
                         `result`
        idempotency_key  makes it durable too: the same key names the same call, whoever submits it again and
                         whatever the arguments
        timeout_s        from now until the result; overrides the function's own, like `retries`
        """
        plan = self._plan(fn)
        spec = plan.spec
        if timeout_s is not None:
            spec = dataclasses.replace(spec, timeout_s=timeout_s)
        if retries is not None:
            spec = dataclasses.replace(spec, retries=retries)
        if durable or idempotency_key:
            return self._durable.submit(
                plan, spec, self._plans.request(spec, ""), (args, kwargs), idempotency_key
            )
        return self.start(plan._replace(spec=spec), args, kwargs)

    def result(self, call_id: str, timeout_s: float | None = None) -> Any:
        """The value of a durable call, or its exception; from any process with this tenant's key."""
        return self._durable.future(CallId(call_id)).result(timeout_s=timeout_s)

    def map(
        self, fn: Callable[..., R], /, *iterables: Iterable[Any], ordered: bool = True,
        chunk: int | None = None, progress: bool = False, return_exceptions: bool = False,
    ) -> Iterator[R]:  # fmt: skip
        """Run fn over the items, as many at once as there are executors; lazily, in bounded memory.

        ordered            results in the order of the items, else as they come
        chunk              items per call; None adapts it to the measured time of an item
        progress           show a bar on the terminal
        return_exceptions  yield a failed item's exception in its place; else MapError after the last result
        """
        options = MapOptions(
            ordered=ordered, chunk=chunk, progress=progress, return_exceptions=return_exceptions
        )
        plan = self._plan(fn)
        whole = (
            plan.spec.retries.max == 0 and plan.spec.timeout_s is None and plan.definition.kind == "function"
        )
        return Mapping(self, plan, self._plans.of_chunk(fn) if whole else None, iterables, options).run()

    def stream(
        self, fn: Callable[..., Iterator[R] | AsyncIterator[R]], /, *args: Any, **kwargs: Any
    ) -> Stream[R]:
        """Run a generator function elsewhere: iterate the items with `for` or `async for`; closing cancels
        it.
        """
        plan = self._plans.of(fn)
        if definitions.kind_of(fn) not in _STREAM_KINDS:
            name = definitions.name_of(fn)
            raise InvalidRequestError(f"{name} is no generator function; use site.call(...)")
        payload = Payload(plan, *plan.encode(args, kwargs))
        payload.items = inbox = Inbox()
        call = self._new_call(plan, payload)
        stream: Stream[R] = Stream(self._engine, attach_future(self._engine, call, payload), inbox)
        self._engine.submit(call)
        return stream

    def actor(self, cls: Callable[..., object], /, *args: Any, **kwargs: Any) -> Actor:
        """Make an instance of a class in an executor of its own; the handle's methods give futures."""
        return Actor(self._engine, self._plans, cls, (args, kwargs))

    def memory(
        self, size: str | int, *, lease_class: LeaseClass | str = LeaseClass.ELASTIC, policy: str = ""
    ) -> Memory:
        """Lease memory of some node: `with site.memory("8GiB") as memory: block = memory.allocate("64MiB")`.

        size         bytes, as text with a unit or as an int; 96 MiB are leased on top, for who holds them
        lease_class  elastic, reserved, or harvested: of what batch jobs lend, and theirs when they need it
        raises       NoCapacityError when no node has that much free, DeniedError with policy's reason
        """
        return Memory(self._engine, self._plans, size, LeaseClass(lease_class), policy)

    def group(self, fn: Callable[..., R], /, size: int) -> Callable[..., list[R]]:
        """`group(fn, size=4)(*args)`: run fn on 4 executors that start together; a list of results by rank.

        fn gets an `isthmus.Context` as its first argument: rank, size and collectives between them.
        """
        return GroupCall(self._engine, self._plans, fn, size)

    # seeing ----------------------------------------------------------------
    def bill(self) -> list[BillRow]:
        """Core-seconds of this tenant so far, by lease class."""
        return self._control.bill()

    def leases(self) -> list[Lease]:
        """The leases this client holds now."""
        mine = frozenset(self._engine.keeper.leases())
        return [lease for lease in self._control.leases() if lease.lease in mine]

    def latency(self) -> LatencyReport:
        """What calls of this client took: cold, warm, hot."""
        return self._engine.latencies.report()

    @property
    def url(self) -> str:
        return self._control.url

    @property
    def usable(self) -> bool:
        """Open, and opened by this process (not by the parent of a fork)."""
        return not self._engine.closed and not self._engine.forked

    # life ----------------------------------------------------------------
    def close(self) -> None:
        """Cancel what is outstanding and give all leases back. Idempotent."""
        if self._dropped.detach() is not None:
            self._dashes.clear()
            self._durable.close()
            _shut(self._engine, self._control, self._on_close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # for the other modules of the sdk ----------------------------------------------------------------
    def start(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[Any]:
        """One call through the scheduler. Raises CodecError when an argument cannot travel."""
        payload = Payload(plan, *plan.encode(args, kwargs))
        call = self._new_call(plan, payload)
        future = attach_future(self._engine, call, payload)
        self._engine.submit(call)
        return future

    @property
    def driver(self) -> Driver:
        return self._engine

    def private_pool(self, name: str, spec: FunctionSpec, limit: int) -> Pool:
        """Executors for one user only, at most `limit`."""
        return self._engine.pool(name, self._plans.request(spec, name), limit)

    def start_pooled(
        self, carrier: Callable[..., Any], setup: tuple[Any, ...], pool: Pool,
        arguments: tuple[tuple[Any, ...], dict[str, Any]], future: Future[Any],
    ) -> None:  # fmt: skip
        """One call of `carrier(*setup)` in that pool; `future` gets its outcome."""
        plan = self._plans.of_wrapped(carrier, setup)._replace(pool=pool)
        payload = Payload(plan, *plan.encode(*arguments))
        call = self._new_call(plan, payload)
        future.call, payload.future = call, future
        self._engine.submit(call)

    def cancel_queued(self, pool: Pool) -> list[Future[Any]]:
        return self._engine.cancel_queued(pool)

    def break_pool(self, pool: Pool, error: BaseException) -> None:
        self._engine.break_pool(pool, error)

    def drop_pool(self, pool: Pool) -> None:
        self._engine.retire_pool(pool)

    @property
    def drop_pool_after_use(self) -> Callable[[Pool], None]:
        """Not bound to this Site, so that a finalizer may hold it."""
        return self._engine.drop_pool_after_use

    def drive_until(
        self, done: Callable[[], bool], deadline_s: float | None, rest: Callable[[float], None]
    ) -> None:
        self._engine.drive_until(done, deadline_s, rest)

    def _plan(self, fn: Any) -> Plan:
        plan = self._plans.of(fn)
        if plan.definition.kind in _STREAM_KINDS:
            raise InvalidRequestError(f"{plan.definition.name} is a generator function; use site.stream(...)")
        return plan

    # the longer path ----------------------------------------------------------------
    def _call_slowly(self, fn: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        plan = self._plan(fn)
        cold = not plan.pool.executors
        began_s = perf_counter()
        value: R = outcome(self.start(plan, args, kwargs))
        (self._engine.cold if cold else self._engine.warm)(perf_counter() - began_s)
        self._bind_dash(fn, plan)
        return value

    def _finish_slowly(
        self, dash: _Dash, number: int, frame: Frame | None, payload: Payload, began_s: float
    ) -> Any:
        """Not answered within the spin, or not by a result: from here on it is an ordinary call."""
        call = new_call(number, dash.plan, payload, dash.number, began_s)
        future = attach_future(self._engine, call, payload)
        self._engine.adopt(call, dash.executor)
        if frame is not None:
            self._engine.receive(frame)
        return outcome(future)

    def _new_call(self, plan: Plan, payload: Payload) -> Call:
        return new_call(next(self._engine.numbers), plan, payload, plan.definition.number)

    def _bind_dash(self, fn: Any, plan: Plan) -> None:
        """Prepare the shortest path for the next call of this function, if it has one."""
        known = self._dashes.get(id(fn))
        if (known is not None and known.link.open and not known.executor.inflight) or not self._plans.keeps(
            fn
        ):
            return
        for executor in list(plan.pool.executors.values()):
            link = executor.link
            assert isinstance(link, Link)
            if link.open and not executor.inflight and plan.definition.number in link.defined:
                self._dashes[id(fn)] = _Dash(plan, executor, link)
                return


def _stop(link: Link, number: int) -> None:
    try:
        link.interrupt(number, b"cancel")
    except FabricError:
        return  # gone, and the call with it


def _retire(engine: Engine, control: Control, on_close: Callable[[], None] | None) -> None:
    """The user dropped the Site: its last calls may still end, then everything is given back."""
    _retiring.add(engine)

    def after() -> None:
        _after(control, on_close)
        _retiring.discard(engine)

    engine.retire(after)


def _shut(engine: Engine, control: Control, on_close: Callable[[], None] | None) -> None:
    engine.close()
    _after(control, on_close)


def _after(control: Control, on_close: Callable[[], None] | None) -> None:
    control.close()
    if on_close is not None:
        on_close()


def _finish_all() -> None:
    """Calls whose Site or Executor was dropped end before the interpreter does."""
    for engine in [*_retiring, *(site._engine for site in list(_open_sites))]:
        engine.finish()


def _close_all() -> None:
    for site in list(_open_sites):
        site.close()


def _forget_all() -> None:
    """In a forked child: nothing of the parent's may be used, or given back, from here."""
    for site in list(_open_sites):
        site._engine.forked = True
        site._dashes.clear()
        site._dropped.detach()
    _open_sites.clear()
    _retiring.clear()


threading._register_atexit(_finish_all)  # type: ignore[attr-defined]  # runs before atexit's own
atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
