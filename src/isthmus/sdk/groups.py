"""Group calls: n executors that start together or not at all, and know each other.

Each member gets an `isthmus.Context` as its first argument: its rank, the group's size, and collectives
between them. Invariants: all members run, or none; when one fails the others are cancelled, because they may
wait for it; the leases end with the call. Nothing is replayed.
Not here: what members say to each other (`isthmus.fabric.collectives`).
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from isthmus.core.errors import InvalidRequestError
from isthmus.core.ids import new_id
from isthmus.fabric import codec
from isthmus.sdk.calls import Payload, Plan, attach_future, new_call
from isthmus.sdk.definitions import Definition
from isthmus.sdk.engine import Engine
from isthmus.sdk.function import NO_RETRY, spec_of
from isthmus.sdk.futures import Future
from isthmus.sdk.links import Link
from isthmus.sdk.plans import Plans

R = TypeVar("R")

SIZE_MAX = 1024  # members of one group; each holds a channel here
START_WAIT_S = 20.0  # how long the site may look for capacity for all of them at once


class GroupCall(Generic[R]):
    """`GroupCall(...)(*args)` runs the function once in every member: a list of results by rank."""

    def __init__(self, engine: Engine, plans: Plans, fn: Callable[..., R], size: int) -> None:
        if not 1 <= size <= SIZE_MAX:
            raise InvalidRequestError(f"a group has 1 to {SIZE_MAX} members, not {size}")
        self._engine = engine
        self._plans = plans
        self._fn = fn
        self._size = size
        self._spec = dataclasses.replace(spec_of(fn), retries=NO_RETRY)

    def __call__(self, *args: Any, **kwargs: Any) -> list[R]:
        """Raises NoCapacityError when not all can start, else what the first failing member raised."""
        name = new_id("gr")
        links = self._start(name)
        plans = [self._plan(name, rank, links) for rank in range(self._size)]
        futures: list[Future[R]] = []
        try:
            for plan, link in zip(plans, links, strict=True):
                self._engine.seat(plan.pool, link)
                futures.append(self._call(plan, args, kwargs))
            return self._collect(futures)
        finally:
            for future in futures:
                future.cancel()
            for plan in plans:
                self._engine.retire_pool(plan.pool)

    def _start(self, name: str) -> list[Link]:
        self._engine.make_room(idle_s=0.0)
        request = self._plans.request(self._spec, getattr(self._fn, "__qualname__", name))
        return self._engine.keeper.take(
            msgspec.structs.replace(request, count=self._size, together=True, wait_s=START_WAIT_S)
        )

    def _plan(self, name: str, rank: int, links: list[Link]) -> Plan:
        """Each member has a pool of its own with one executor, and its own row of the group's table."""
        peers = tuple((link.holding.address, link.holding.token) for link in links)
        table = codec.GroupTable(group=name, rank=rank, peers=peers)
        definition: Definition = self._plans.definitions.of_member(self._fn, table)
        pool = self._engine.pool(f"{name}/{rank}", None, limit=0, sticky=True)
        return Plan(definition, self._spec, pool, codec.encode_call, codec.decode_value)

    def _call(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[R]:
        payload = Payload(plan, *plan.encode(args, kwargs))
        call = new_call(next(self._engine.numbers), plan, payload)
        future: Future[R] = attach_future(self._engine, call, payload)
        self._engine.submit(call)
        return future

    def _collect(self, futures: list[Future[R]]) -> list[R]:
        def settled() -> bool:
            return all(future.done() for future in futures) or _first_failure(futures) is not None

        def rest(duration_s: float) -> None:
            concurrent.futures.wait(futures, duration_s, concurrent.futures.FIRST_EXCEPTION)

        self._engine.drive_until(settled, None, rest)
        failure = _first_failure(futures)
        if failure is not None:
            raise failure
        return [future.result() for future in futures]


def _first_failure(futures: list[Future[R]]) -> BaseException | None:
    for future in futures:
        if future.done() and not future.cancelled() and future.exception() is not None:
            return future.exception()
    return None
