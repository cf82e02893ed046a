"""Which definition, pool and encoding the calls of a function use; worked out once per function.

Invariant: a row lives no longer than its function, because it is keyed by identity. What is not a plain
function (bound methods, partials, callable objects) has state that may change, so it is looked at anew for
each call.
"""

import weakref
from collections.abc import Callable
from typing import Any

from isthmus.core.api import LeaseRequest
from isthmus.core.model import Environment
from isthmus.fabric import codec
from isthmus.sdk import definitions, environment
from isthmus.sdk.calls import Plan, decode_native, encode_native, encode_through
from isthmus.sdk.carriers import CARRIERS, Chunk
from isthmus.sdk.engine import Engine
from isthmus.sdk.function import FunctionSpec, NativeFunction, spec_of
from isthmus.sdk.work import Pool


class Plans:
    """forget  is called with the id of a function that is gone"""

    def __init__(self, engine: Engine, caller: Environment, forget: Callable[[int], object]) -> None:
        self.definitions = definitions.Definitions()
        self._engine = engine
        self._environment = caller
        self._rows: dict[int, tuple[Plan, weakref.ref[Any]]] = {}
        self._chunks: dict[int, Plan] = {}
        self._wrapped: dict[int, tuple[tuple[object, ...], Plan]] = {}
        self._forget = forget

    def of(self, fn: Any) -> Plan:
        row = self._rows.get(id(fn))
        return row[0] if row is not None else self._make(fn)

    def of_chunk(self, fn: Any) -> Plan | None:
        """For calls that carry many rows of arguments of fn, under fn's own name."""
        known = self._chunks.get(id(fn))
        if known is not None:
            return known
        plan = self.of(fn)
        definition = self.definitions.of_chunk(Chunk(fn), definitions.name_of(fn))
        if definition is None:
            return None
        made = plan._replace(definition=definition, encode=codec.encode_call, decode=codec.decode_value)
        if self.keeps(fn):
            self._chunks[id(fn)] = made
        return made

    def of_wrapped(self, wrapper: Callable[..., Any], setup: tuple[Any, ...]) -> Plan:
        """For calls of `wrapper(*setup)`, where setup[0] is the user's function."""
        fn = setup[0]
        key = (wrapper, *map(id, setup))
        known = self._wrapped.get(id(fn))
        if known is not None and known[0] == key:
            return known[1]
        plan = self.of(fn)
        if not self.keeps(fn) or plan.definition.kind != "function":
            carrier = CARRIERS[definitions.kind_of(fn)]
            inner = self.of_wrapped(wrapper, (carrier, *setup[1:]))
            return inner._replace(spec=plan.spec, encode=encode_through(fn))
        definition = self.definitions.of_chunk(wrapper(*setup), definitions.name_of(fn))
        assert definition is not None
        made = plan._replace(definition=definition)
        self._wrapped[id(fn)] = (key, made)
        return made

    def keeps(self, fn: Any) -> bool:
        return id(fn) in self._rows

    def request(self, spec: FunctionSpec, name: str) -> LeaseRequest:
        wanted = self._environment if spec.environment is None else environment.complete(spec.environment)
        return LeaseRequest(
            resources=spec.resources, lease_class=spec.lease_class, environment=wanted,
            policy=spec.policy, function=name,
        )  # fmt: skip

    def _make(self, fn: Any) -> Plan:
        spec = spec_of(fn)
        pool = self._pool(spec, definitions.name_of(fn))
        definition = self.definitions.of(fn)
        if definition is None:
            carrier = self.definitions.of(CARRIERS[definitions.kind_of(fn)])
            assert carrier is not None
            return Plan(carrier, spec, pool, encode_through(fn), codec.decode_value)
        if isinstance(fn, NativeFunction):
            return self._remember(fn, Plan(definition, spec, pool, encode_native, decode_native))
        return self._remember(fn, Plan(definition, spec, pool, codec.pack_call, codec.decode_value))

    def _pool(self, spec: FunctionSpec, name: str) -> Pool:
        request = self.request(spec, name)
        key = f"{request.resources}/{request.lease_class}/{request.environment.id}/{request.policy}"
        return self._engine.pool(key, request, self._engine.settings.pool_max)

    def _remember(self, fn: Any, plan: Plan) -> Plan:
        key, tables, forget = id(fn), (self._rows, self._chunks, self._wrapped), self._forget

        def gone(_: weakref.ref[Any]) -> None:
            for table in tables:
                table.pop(key, None)
            forget(key)

        self._rows[key] = (plan, weakref.ref(fn, gone))
        return plan
