"""Durable calls: the site keeps them, so they survive this client; run at least once, with one recorded
result.

Invariant: a durable future fails only with the call's own outcome. A site that is down is waited for, not
reported, because the call is safe there; `result(timeout_s=...)` bounds the wait.
"""

import threading
from collections.abc import Callable
from typing import Any

from isthmus.core.api import CallResult, DurableCall, LeaseRequest
from isthmus.core.errors import CallCancelledError, InvalidRequestError, IsthmusError, SiteUnavailableError
from isthmus.core.ids import CallId
from isthmus.fabric import codec
from isthmus.fabric.frames import Kind
from isthmus.sdk.calls import Plan
from isthmus.sdk.control import Control
from isthmus.sdk.function import FunctionSpec
from isthmus.sdk.futures import Future

WATCH_S = 0.25  # how long the watcher asks for one call before it looks at the next
DOWN_PAUSE_S = 0.5  # between two tries while the site does not answer


class DurableCalls:
    def __init__(self, control: Control, make_room: Callable[[], None]) -> None:
        """make_room  gives back cores that this client holds idle: its durable calls may wait for them"""
        self._control = control
        self._make_room = make_room
        self._pending: dict[CallId, Future[Any]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def submit(
        self, plan: Plan, spec: FunctionSpec, request: LeaseRequest,
        arguments: tuple[tuple[Any, ...], dict[str, Any]], idempotency_key: str,
    ) -> Future[Any]:  # fmt: skip
        meta, data = plan.encode(*arguments)
        summary = self._control.submit_call(
            DurableCall(
                function_name=plan.definition.name,
                function_kind=plan.definition.kind,
                function_code=plan.definition.code,
                arguments_meta=bytes(meta),
                arguments_data=bytes(codec.join(data)),
                resources=request.resources,
                lease_class=request.lease_class,
                environment=request.environment,
                policy=request.policy,
                idempotency_key=idempotency_key,
                timeout_s=spec.timeout_s or 0.0,
                retries=spec.retries.max,
            )
        )
        _check_same(summary.function, plan.definition.name, idempotency_key)
        return self.future(summary.call)

    def future(self, call: CallId) -> Future[Any]:
        """The future of a call that was submitted here or elsewhere."""
        with self._lock:
            future = self._pending.get(call)
            if future is None:
                future = self._pending[call] = Future(self, call)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="isthmus.durable", daemon=True)
                self._watcher.start()
        return future

    def close(self) -> None:
        """The calls go on at the site; only this client stops to look."""
        self._closed.set()

    # Driver: the watcher does the work ----------------------------------------------------------------
    def wait(self, future: Future[Any], deadline_s: float | None) -> None:
        return

    def follow(self, future: Future[Any]) -> None:
        return

    def cancel(self, future: Future[Any]) -> bool:
        self._control.cancel_call(future.call_id)
        with self._lock:
            self._pending.pop(future.call_id, None)
        return True

    # the watcher ----------------------------------------------------------------
    def _watch(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                pending = list(self._pending.items())
                if not pending:
                    self._watcher = None
                    return
            self._make_room()
            for position, (call, future) in enumerate(pending):
                self._look(call, future, WATCH_S if position == 0 else 0.0)

    def _look(self, call: CallId, future: Future[Any], wait_s: float) -> None:
        try:
            result = self._control.call_result(call, wait_s)
        except SiteUnavailableError:
            self._closed.wait(DOWN_PAUSE_S)
            return
        except IsthmusError as error:
            self._settle(call, future, None, error)
            return
        if result.state not in ("queued", "running"):
            self._settle(call, future, result, None)

    def _settle(
        self, call: CallId, future: Future[Any], result: CallResult | None, error: BaseException | None
    ) -> None:
        with self._lock:
            self._pending.pop(call, None)
        if future.done():
            return
        value = None
        if result is not None:
            try:
                value, error = _outcome(result)
            except IsthmusError as unreadable:
                error = unreadable
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)


def _check_same(known: str, wanted: str, idempotency_key: str) -> None:
    """A key that names another function's call is a mistake. Modules may differ: a script is `__main__`."""
    if known.rpartition(".")[2] != wanted.rpartition(".")[2]:
        raise InvalidRequestError(
            f"idempotency_key={idempotency_key!r} names a call of {known} already; take another for {wanted}"
        )


def _outcome(result: CallResult) -> tuple[Any, BaseException | None]:
    data = memoryview(result.data) if result.data else None
    if result.kind == Kind.RESULT:
        return codec.decode_value(result.meta, data), None
    if result.kind == Kind.ERROR:
        return None, codec.decode_error(result.meta, data)
    return None, CallCancelledError(result.detail or f"call {result.call} was {result.state}")
