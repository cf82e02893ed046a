"""Actors: an instance of a class that lives in an executor of its own.

Invariants: calls run one at a time, in the order submitted; when the executor dies, the state is lost and
every further call says so. Nothing is retried or replayed.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from isthmus.core.errors import LeaseEndedError
from isthmus.fabric import codec
from isthmus.sdk.calls import Payload, Plan, attach_future, new_call
from isthmus.sdk.engine import Engine
from isthmus.sdk.function import NO_RETRY, FunctionSpec, spec_of
from isthmus.sdk.futures import Future, outcome
from isthmus.sdk.plans import Plans
from isthmus.sdk.streaming import Inbox, Stream

_instances = itertools.count(1)


class Method:
    """A method of an actor: called, it gives a future."""

    def __init__(self, actor: "Actor", name: str) -> None:
        self._actor = actor
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._actor._start(self._name, args, kwargs, None)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Run it and wait for the value. An interrupted wait cancels the call."""
        try:
            return outcome(self(*args, **kwargs))
        finally:
            del self  # a traceback that is kept would keep the actor, and with it its cores

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """For a generator method: its items as they come."""
        inbox = Inbox()
        return Stream(self._actor._engine, self._actor._start(self._name, args, kwargs, inbox), inbox)


class Actor:
    """A handle: `counter.add(1)` gives a future, `counter.add.call(1)` its value. Closing it ends the
    instance; a call after that raises LeaseEndedError.
    """

    def __init__(
        self,
        engine: Engine,
        plans: Plans,
        cls: Any,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        spec: FunctionSpec | None = None,
    ) -> None:
        """Returns when the instance is made. Raises what `__init__` raised.

        spec  what this instance asks of its place, if not what its class asks
        """
        spec = dataclasses.replace(spec or spec_of(cls), retries=NO_RETRY)
        instance = next(_instances)
        definition = plans.definitions.of_actor(cls, instance)
        pool = engine.pool(f"actor/{instance}", plans.request(spec, definition.name), limit=1, sticky=True)
        self._engine = engine
        self._plan = Plan(definition, spec, pool, codec.encode_call, codec.decode_value)
        self._dropped = weakref.finalize(self, engine.drop_pool, pool)
        self._dropped.atexit = False
        try:
            self._start("__init__", arguments[0], arguments[1], None).result()
        except BaseException:
            self.close()
            raise

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_"):
            raise AttributeError(name)
        return Method(self, name)

    def close(self) -> None:
        """Cancel what is outstanding, run its `@isthmus.exit` methods, give its executor back. Idempotent."""
        if self._dropped.detach() is not None:
            self._engine.retire_pool(self._plan.pool)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], inbox: Inbox | None
    ) -> Future[Any]:
        if not self._dropped.alive:
            raise LeaseEndedError(f"this {self._plan.definition.name} was closed; make another one")
        plan, engine = self._plan, self._engine
        payload = Payload(plan, *plan.encode((method, *args), kwargs))
        payload.items = inbox
        call = new_call(next(engine.numbers), plan, payload, name=f"{plan.definition.name}.{method}")
        future = attach_future(engine, call, payload)
        engine.submit(call)
        return future
