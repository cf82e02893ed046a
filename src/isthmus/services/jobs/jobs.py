"""Run durable calls: at least once each, with one recorded result, through deaths of clients, executors and
the site.

A call is on disk before its client hears of it (`store.py`); a loop here starts what may start, the tenant
with the fewest running calls first. How an attempt ended decides what follows:

    a result                                         done
    the function's exception                         retried with backoff while `retries` last, then failed
    a dead executor                                  the same; if it was killed, KILLS_MAX times in any case
    timeout_s passed                                 failed
    evicted, node lost, link broken, refused         started again elsewhere; charged to nobody
The site stores and relays bytes; only the tenant's executor decodes them.
"""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import structlog

from isthmus.core import errors
from isthmus.core.api import CallResult, CallSummary, DurableCall
from isthmus.core.clock import Clock
from isthmus.core.ids import CallId, TenantId
from isthmus.core.model import EndReason, LeaseState, Principal, Quota
from isthmus.core.settings import JobsSettings
from isthmus.fabric.codec import FunctionHeader, encode_error, encode_header, join
from isthmus.fabric.frames import Kind
from isthmus.services.jobs.relay import Answer, Question, Relay
from isthmus.services.jobs.slots import LeaseSource, Slot, Slots
from isthmus.services.jobs.store import CallStore, Ending, QueuedCall
from isthmus.telemetry import metrics

KILLS_MAX = 3  # of its executor, that a call bears; one that brings them about itself must come to an end
CANCEL_GRACE_S = 2.0  # for the function to notice; then its executor is killed
AUTOPSY_S = 3.0  # how long the agent's report about a dead executor is waited for
_AUTOPSY_POLL_S = 0.1
FORGET_PERIOD_S = 600.0
WAIT_MAX_S = 60.0  # for one long poll of a result
TIMEOUT_MAX_S = 365 * 86400.0
RETRIES_MAX = 1_000_000
DISK_RETRY_S = 2.0
BACKOFF_S = 0.1
BACKOFF_MAX_S = 10.0
RUNNABLE_KINDS = ("function", "async")

_T = TypeVar("_T")
_log = structlog.get_logger("services.jobs")


class _Retry(NamedTuple):
    """The attempt came to nothing. `charge`: it counts against the call's retries, of which there are `least`
    at least, and fails it when none is left.
    """

    charge: bool
    error: errors.IsthmusError
    answer: Answer | None = None
    least: int = 0


class _Running:
    """A call that is being started or runs, in this process."""

    def __init__(self, queued: QueuedCall) -> None:
        self.queued = queued
        self.cancelled = asyncio.Event()


class Jobs:
    """`quota_of` gives a tenant's quota at the moment a lease is asked for."""

    def __init__(
        self,
        settings: JobsSettings,
        source: LeaseSource,
        store: CallStore,
        relay: Relay,
        clock: Clock,
        quota_of: Callable[[TenantId], Quota],
    ) -> None:
        self._settings = settings
        self._source = source
        self._store = store
        self._clock = clock
        self._quota_of = quota_of
        self._relay = relay
        self._slots = Slots(source, relay, clock)
        self._disk = ThreadPoolExecutor(1, "services.jobs.store")
        self._running: dict[CallId, _Running] = {}
        self._wake = asyncio.Event()
        self._ended: dict[CallId, list[asyncio.Future[None]]] = {}

    # what clients ask
    # -------------------------------------------------------------------------------------------
    async def submit(self, principal: Principal, call: DurableCall) -> CallSummary:
        """The call is on disk when this returns. The same idempotency key gives the same call."""
        if call.function_kind not in RUNNABLE_KINDS:
            raise errors.InvalidRequestError(
                f"a durable call runs a function or an async function, not a {call.function_kind!r}"
            )
        _check_limits(call)
        summary = await self._on_disk(self._store.add, principal.tenant, call, self._clock.now())
        self._wake.set()
        return summary

    async def calls(self, principal: Principal) -> list[CallSummary]:
        return await self._on_disk(self._store.summaries, _visible_to(principal))

    async def call(self, principal: Principal, call: CallId) -> CallSummary:
        return await self._on_disk(self._store.summary, _visible_to(principal), call)

    async def result(self, principal: Principal, call: CallId, wait_s: float) -> CallResult:
        """The result so far; waits up to wait_s (at most WAIT_MAX_S) for the final one."""
        ended = asyncio.get_running_loop().create_future()
        self._ended.setdefault(call, []).append(ended)
        try:
            result = await self._on_disk(self._store.result, _visible_to(principal), call)
            if result.state not in ("queued", "running") or not wait_s > 0:  # no number is no wait either
                return result
            await asyncio.wait({ended}, timeout=min(wait_s, WAIT_MAX_S))
            return await self._on_disk(self._store.result, _visible_to(principal), call)
        finally:
            self._ended[call].remove(ended)
            if not self._ended[call]:
                del self._ended[call]

    async def cancel(self, principal: Principal, call: CallId) -> CallSummary:
        """Queued or running, it ends as cancelled; one that has ended stays as it is."""
        await self._on_disk(self._store.summary, _visible_to(principal), call)
        await self._end(
            call, _failure("cancelled", errors.CallCancelledError(f"durable call {call} was cancelled"))
        )
        running = self._running.get(call)
        if running is not None:
            running.cancelled.set()
        return await self._on_disk(self._store.summary, _visible_to(principal), call)

    # the loop
    # ---------------------------------------------------------------------------------------------------
    async def run(self) -> None:
        """Start what may start, until cancelled. Calls that ran when the last site died start again."""
        recovered = await self._on_disk(self._store.recover)
        if recovered:
            _log.info("durable calls start again after a restart", calls=recovered)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._slots.end_orphans(), name="services.jobs.orphans")
            tasks.create_task(self._slots.run(), name="services.jobs.slots")
            tasks.create_task(self._forget(), name="services.jobs.forget")
            while True:
                self._wake.clear()
                await self._start_waiting(tasks)
                await self._until_next()

    async def close(self) -> None:
        await self._slots.close()
        await self._relay.close()
        self._disk.shutdown()

    async def _start_waiting(self, tasks: asyncio.TaskGroup) -> None:
        while len(self._running) < self._settings.concurrency_max:
            queued = await self._next()
            if queued is None:
                return
            self._running[queued.call] = _Running(queued)
            tasks.create_task(self._attempt(self._running[queued.call]), name=f"services.jobs {queued.call}")

    async def _next(self) -> QueuedCall | None:
        """The oldest waiting call of the tenant that has the fewest running."""
        now_s = self._clock.now()
        busy = Counter(running.queued.tenant for running in self._running.values())
        starting = frozenset(self._running)
        waiting = await self._on_disk(self._store.waiting_tenants, now_s)
        for tenant in sorted(waiting, key=lambda tenant: (busy[tenant], tenant)):
            queued = await self._on_disk(self._store.oldest, tenant, now_s, starting)
            if queued is not None:
                return queued
        return None

    async def _until_next(self) -> None:
        """Until something was submitted or ended, or a backoff is over."""
        ready_s = None if len(self._running) >= self._settings.concurrency_max else await self._next_ready_s()
        delay_s = None if ready_s is None else max(ready_s - self._clock.now(), 0.0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._wake.wait()

    async def _next_ready_s(self) -> float | None:
        return await self._on_disk(self._store.next_ready_s, self._clock.now())

    async def _forget(self) -> None:
        while True:
            await self._on_disk(self._store.forget, self._clock.now())
            await self._clock.sleep(FORGET_PERIOD_S)

    # one attempt
    # ------------------------------------------------------------------------------------------------
    async def _attempt(self, running: _Running) -> None:
        queued = running.queued
        try:
            await self._conclude(queued, await self._try(running))
        except errors.IsthmusError as error:  # refused for good: denied, makes no sense
            await self._end(queued.call, _failure("failed", error))
        except Exception as error:  # a task boundary: our own fault ends this call, not the others
            _log.exception("durable call failed", call=queued.call)
            words = f"the site failed on this call: {type(error).__name__}; see its log"
            await self._end(queued.call, _failure("failed", errors.CallError(words)))
        finally:
            del self._running[queued.call]
            self._wake.set()

    async def _try(self, running: _Running) -> Ending | _Retry | None:
        """How the attempt ended; None when it was cancelled."""
        queued = running.queued
        principal = Principal(
            tenant=queued.tenant, name=f"durable call {queued.call}", quota=self._quota_of(queued.tenant)
        )
        slot = await self._take(running, principal)
        if slot is None:
            return None
        healthy = False
        try:
            if not await self._on_disk(self._store.start, queued.call, slot.lease):
                healthy = True
                return None
            metrics.CALL_ATTEMPTS.inc()
            outcome = await self._converse(running, slot)
            healthy = isinstance(outcome, Ending) or (
                isinstance(outcome, _Retry) and outcome.answer is not None
            )
            return outcome
        finally:
            await (self._slots.give(slot) if healthy else self._slots.discard(slot))

    async def _take(self, running: _Running, principal: Principal) -> Slot | None:
        """A slot, or None when the call was cancelled while it waited for one."""
        taking = asyncio.ensure_future(self._slots.take(principal, running.queued.body))
        try:
            await _first(taking, running.cancelled.wait())
        finally:
            was_taken = taking.done()
            taking.cancel()  # else it would go on taking when nobody wants a slot any more
            await asyncio.gather(taking, return_exceptions=True)
        return taking.result() if was_taken else None

    async def _converse(self, running: _Running, slot: Slot) -> Ending | _Retry | None:
        """Send the call, wait for its end, interrupt it when it is cancelled or late."""
        body = running.queued.body
        question = _question(slot, body)
        answering = self._relay.call(question)
        interruption = await _first(answering, running.cancelled.wait(), timeout_s=body.timeout_s or None)
        if not answering.done():
            why = b"cancel" if interruption else b"timeout"
            self._relay.cancel(slot.channel_id, question.call_id, why)
            await asyncio.wait({answering}, timeout=CANCEL_GRACE_S)
            if not answering.done():
                answering.cancel()
                await self._kill(slot)
                return None if interruption else _failure("failed", _late(body))
        try:
            answer = await answering
        except errors.PeerLostError as error:
            return await self._autopsy(slot, error)
        return _judge(answer, None if interruption is None else _late(body))

    async def _kill(self, slot: Slot) -> None:
        for executor in slot.grant.executors:
            with contextlib.suppress(
                errors.IsthmusError
            ):  # gone already, or its node is: the slot is discarded
                await self._source.kill_executor(slot.principal, slot.lease, executor.executor)

    async def _autopsy(self, slot: Slot, error: errors.PeerLostError) -> _Retry:
        """Why the executor is gone. Only a death of its own doing is charged to the call."""
        give_up_s = self._clock.monotonic() + AUTOPSY_S
        while self._clock.monotonic() < give_up_s:
            lease = self._source.lease(slot.principal, slot.lease)
            if lease.state is LeaseState.ENDED:
                break
            await self._clock.sleep(_AUTOPSY_POLL_S)
        match lease.end_reason:
            case EndReason.OUT_OF_MEMORY:
                words = f"went over its memory ({slot.shape.resources.memory}): {lease.end_detail}"
                return _Retry(True, errors.MemoryLimitError(f"the executor {words}; ask for more"))
            case EndReason.EXITED | EndReason.KILLED as reason:
                lost = errors.ExecutorLostError(f"the executor died: {lease.end_detail}")
                return _Retry(True, lost, least=KILLS_MAX if reason is EndReason.KILLED else 0)
            case None:
                return _Retry(False, error)
            case reason:
                return _Retry(False, errors.EvictedError(f"lease {slot.lease} ended: {reason.value}"))

    async def _conclude(self, queued: QueuedCall, outcome: Ending | _Retry | None) -> None:
        match outcome:
            case Ending():
                await self._end(queued.call, outcome)
            case _Retry():
                await self._retry(queued, outcome)

    async def _retry(self, queued: QueuedCall, outcome: _Retry) -> None:
        charged = queued.charged + outcome.charge
        if charged > max(queued.body.retries, outcome.least):
            await self._end(queued.call, _failed_for_good(outcome))
        elif queued.attempts + 1 >= self._settings.attempts_max:
            words = f"{queued.attempts + 1} attempts came to nothing, the last one because: {outcome.error}"
            await self._end(queued.call, _failure("failed", errors.CallError(words)))
        else:
            tries = charged if outcome.charge else queued.attempts + 1 - queued.charged
            ready_s = self._clock.now() + min(BACKOFF_S * 2 ** min(tries, 20), BACKOFF_MAX_S)
            detail = f"attempt {queued.attempts + 1}: {outcome.error}"
            await self._persist(self._store.requeue, queued.call, ready_s, outcome.charge, detail)

    async def _end(self, call: CallId, ending: Ending) -> None:
        if await self._persist(self._store.end, call, ending, self._clock.now()):
            metrics.CALLS_ENDED.labels(ending.state).inc()
        for waiting in self._ended.get(call, ()):
            if not waiting.done():
                waiting.set_result(None)

    async def _persist(self, act: Callable[..., _T], *values: Any) -> _T:
        """Like `_on_disk`, but a full disk is waited out: an outcome in hand is not thrown away for it."""
        while True:
            try:
                return await self._on_disk(act, *values)
            except errors.SiteUnavailableError as error:
                _log.error("an outcome waits for the disk", why=str(error))
                await self._clock.sleep(DISK_RETRY_S)

    async def _on_disk(self, act: Callable[..., _T], *values: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, act, *values)


def _check_limits(call: DurableCall) -> None:
    """Raises InvalidRequestError."""
    if not 0 <= call.timeout_s <= TIMEOUT_MAX_S or not 0 <= call.retries <= RETRIES_MAX:
        raise errors.InvalidRequestError(
            f"timeout_s={call.timeout_s:g} must be within 0 to {TIMEOUT_MAX_S:g},"
            f" retries={call.retries} within 0 to {RETRIES_MAX}"
        )
    if len(call.idempotency_key) > 200 or len(call.function_name) > 1000:
        raise errors.InvalidRequestError(
            "an idempotency key has at most 200 characters, a function's name at most 1000"
        )


def _visible_to(principal: Principal) -> TenantId | None:
    """Whose calls a principal sees; None: all."""
    return None if principal.role in ("admin", "operator") else principal.tenant


async def _first(
    work: asyncio.Future[Any], event: Coroutine[Any, Any, Any], timeout_s: float | None = None
) -> bool | None:
    """Wait for either. True: the event came first; False: the time was over first; None: the work is done."""
    watching = asyncio.ensure_future(event)
    try:
        await asyncio.wait({work, watching}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return None if work.done() else watching.done()
    finally:
        watching.cancel()


def _question(slot: Slot, body: DurableCall) -> Question:
    """The call as frames; the function travels only the first time on a channel."""
    digest = hashlib.blake2b(body.function_code, digest_size=16).hexdigest()
    define = None
    if digest not in slot.functions:
        slot.functions[digest] = len(slot.functions)
        header = FunctionHeader(name=body.function_name, kind=body.function_kind, digest=digest)  # type: ignore[arg-type]
        define = (encode_header(header), body.function_code)
    slot.calls += 1
    return Question(
        channel_id=slot.channel_id,
        call_id=slot.calls,
        function_id=slot.functions[digest],
        define=define,
        meta=body.arguments_meta,
        data=body.arguments_data,
        deadline_ns=int(body.timeout_s * 1e9),
    )


def _judge(answer: Answer, late: errors.CallTimeoutError | None) -> Ending | _Retry:
    """What an answer means. A call that we interrupted ends with its answer, whatever that is."""
    match answer.kind:
        case Kind.RESULT:
            return Ending("done", answer.kind, answer.meta, answer.data)
        case Kind.ERROR if late is None:
            return _Retry(True, errors.CallError("the function raised an exception"), answer)
        case Kind.ERROR:
            return Ending("failed", answer.kind, answer.meta, answer.data, str(late))
        case _:
            words = answer.meta.decode("utf-8", "replace")
            return (
                _failure("failed", late) if late else _Retry(False, errors.EvictedError(f"refused: {words}"))
            )


def _failed_for_good(outcome: _Retry) -> Ending:
    if outcome.answer is None:
        return _failure("failed", outcome.error)
    return Ending("failed", outcome.answer.kind, outcome.answer.meta, outcome.answer.data, str(outcome.error))


def _late(body: DurableCall) -> errors.CallTimeoutError:
    return errors.CallTimeoutError(f"{body.function_name} did not end within timeout_s={body.timeout_s:g}")


def _failure(state: Any, error: errors.IsthmusError) -> Ending:
    """A final state of the site's own making, told as the frame that an executor would have sent."""
    encoded = encode_error(error)
    detail = f"{type(error).__name__}: {error}"
    return Ending(state, Kind.ERROR, encoded.meta, bytes(join(encoded.data)), detail)
