"""Decide which call goes to which executor, and what follows when one fails.

Pure: events come in as method calls that carry the time, effects collect in `effects`; no I/O, clock, thread
or lock. Invariants: an accepted call is settled exactly once; no executor holds more calls than its window;
a call that was turned back, or whose lease was taken, runs elsewhere without charging its retry budget.
Not here: when to ask for more executors (`growing.py`), carrying effects out (`engine.py`), what a call
carries (opaque here).

    submitted -> QUEUED -> SENT -> settled            answered, or failed with no retries left
                   ^  ^      |
                   |  +------+-> EXAMINED -> settled   its executor died; the site says why
                   +-- WAITING <-+                     backoff before a retry
"""

from isthmus.core.errors import (
    CallTimeoutError,
    EvictedError,
    ExecutorLostError,
    IsthmusError,
    NoCapacityError,
)
from isthmus.sdk.growing import Growing, Refusal
from isthmus.sdk.timers import Timers
from isthmus.sdk.work import (
    NEVER,
    UNKNOWN_S,
    Call,
    Close,
    Due,
    Effect,
    Examine,
    Executor,
    Interrupt,
    Kill,
    Pool,
    Release,
    Send,
    Settle,
    State,
)

WINDOW_MAX = 128  # calls in flight on one executor; below the 256 credits a channel starts with
PREFETCH_S = 0.004  # work kept queued at an executor; more hides latency, less balances better
IDLE_S = 2.0  # an executor without work is given back after this
LONG_S = 1.0  # functions that take longer are not begun where they may not end: shorter ones get the grace
LAST_IDLE_S = 20.0  # ... and the last one of a pool after this; others may wait for it, for QUEUE_WAIT_S
KILL_GRACE_S = 2.0  # between asking running code to stop and killing its process
RETRY_BACKOFF_S_MAX = 30.0


def _late(call: Call) -> CallTimeoutError:
    limit = "its time limit" if call.timeout_s is None else f"timeout_s={call.timeout_s:g}"
    return CallTimeoutError(
        f"{call.name or 'the call'} did not end within {limit}, its wait for cores included"
    )


def _has_room(executor: Executor) -> bool:
    held = len(executor.inflight)
    return not (
        executor.draining
        or executor.claimed
        or held >= WINDOW_MAX
        or (held and executor.load_s >= PREFETCH_S)
    )


class Dispatch:
    def __init__(self, capacity_wait_s: float) -> None:
        """capacity_wait_s: how long calls without an executor may wait for one before they fail."""
        self.effects: list[Effect] = []
        self.pools: dict[str, Pool] = {}
        self.outstanding = 0  # calls somebody still waits for
        self.abandoned = 0  # calls nobody waits for, on which an executor still works
        self._timers = Timers()
        self._expected_s: dict[int, float] = {}  # by label
        self._longest_s: dict[int, float] = {}  # by label: what one may well take
        self._growing = Growing(capacity_wait_s, self.effects, self._timers, self._expected_s)

    def take_effects(self) -> list[Effect]:
        """What is to be carried out, in this order; once."""
        taken = self.effects.copy()
        self.effects.clear()
        return taken

    # calls ------------------------------------------------------------------------
    def submit(self, call: Call, now_s: float) -> None:
        self.outstanding += 1
        if call.deadline_s != NEVER:
            self._timers.at(call.deadline_s, Due.DEADLINE, call)
        if call.pool.broken is not None:
            self._settle(call, call.pool.broken)
            return
        self._enqueue(call)
        self._assign(call.pool, now_s)

    def adopt(self, call: Call, executor: Executor) -> None:
        """A call that was sent (at call.sent_s) past this scheduler: from now on it is an ordinary one."""
        self.outstanding += 1
        executor.claimed, call.state = False, State.SENT
        executor.load_s += call.expected_s
        calls = sorted((call, *executor.inflight.values()), key=lambda one: one.sent_s)
        executor.inflight = {one.number: one for one in calls}
        if call.deadline_s != NEVER:
            self._timers.at(call.deadline_s, Due.DEADLINE, call)
        if executor.name not in call.pool.executors:
            self._examine(executor, call)

    def resume(self, pool: Pool, now_s: float) -> None:
        """An executor of this pool is no longer claimed."""
        self._assign(pool, now_s)

    def answered(self, executor: Executor, number: int, now_s: float) -> Call | None:
        """A result came. Gives the call if somebody still waits for it; the caller settles it."""
        call = executor.inflight.pop(number, None)
        if call is None:
            return None
        self._measure(executor, call, now_s)
        wanted = self._finish(call)
        self._assign(executor.pool, now_s)
        return call if wanted else None

    def failed(self, executor: Executor, number: int, error: BaseException, now_s: float) -> None:
        call = executor.inflight.pop(number, None)
        if call is None:
            return
        self._measure(executor, call, now_s)
        self._retry_or_settle(call, error, now_s)
        self._assign(executor.pool, now_s)

    def turned_back(self, executor: Executor, number: int, now_s: float) -> None:
        """The executor did not admit the call: it goes elsewhere, ahead of the others, free of charge."""
        executor.draining = True
        call = executor.inflight.pop(number, None)
        if call is not None:
            self._put_back(call)
        self._retire_if_drained(executor)
        self._assign(executor.pool, now_s)

    def cancel(self, call: Call, now_s: float) -> bool:
        """Forget the call; whoever cancels settles it. False: it is settled already."""
        if call.state is State.SETTLED or call.abandoned:
            return False
        self._withdraw(call, b"cancel", now_s)
        return True

    def cancel_queued(self, pool: Pool, keep_oldest: bool = False) -> list[Call]:
        """Withdraw every call that no executor has seen, but perhaps the one an executor is being had for."""
        kept = 1 if keep_oldest and pool.requesting and not pool.executors else 0
        calls = list(pool.queue)[kept:]
        while len(pool.queue) > kept:
            pool.queue.pop()
        for call in calls:
            self._finish(call)
        return calls

    # executors ------------------------------------------------------------------------
    def pool(self, name: str, request: object, limit: int, sticky: bool = False) -> Pool:
        pool = self.pools.get(name)
        if pool is None:
            pool = self.pools[name] = Pool(name, request, limit, sticky)
        return pool

    def granted(self, pool: Pool, executors: list[Executor], now_s: float) -> None:
        self._growing.granted(pool)
        if pool.retired:  # its user left while the request was under way
            self.effects += [Release(executor) for executor in executors]
            return
        for executor in executors:
            executor.last_s = now_s
            pool.executors[executor.name] = executor
            self._timers.at(now_s + IDLE_S, Due.IDLE, executor)
        life_s = max((executor.closes_s - now_s for executor in executors), default=0.0)
        pool.life_s = max(pool.life_s, life_s)
        if pool.queue and life_s < self._longest_s.get(pool.queue[0].label, 0.0):
            self._growing.pause(pool, now_s)  # others like these would not do either
        self._assign(pool, now_s)

    def refused(self, pool: Pool, error: IsthmusError, now_s: float) -> None:
        """The site gave nothing."""
        if pool.executors or (pool.queue and isinstance(error, NoCapacityError)):
            self.release_idle(0.0, now_s, spare=pool)
        if self._growing.refused(pool, error, now_s) is Refusal.FAIL:
            self._fail_queue(pool, error)
        self._assign(pool, now_s)

    def lost(self, executor: Executor, now_s: float) -> None:
        """Its process is gone. What may have run is examined; what cannot have begun goes elsewhere."""
        pool = executor.pool
        if pool.executors.pop(executor.name, None) is None:
            return
        calls = list(executor.inflight.values())
        if pool.sticky:
            self._break_sticky(pool, executor)
        begun = calls if pool.sticky else calls[:1]
        for call in reversed(calls[len(begun) :]):
            self._put_back(call)
        for call in begun:
            if call.abandoned:
                self._finish(call)
            else:
                self._examine(executor, call)
        executor.inflight = {call.number: call for call in begun if call.state is State.EXAMINED}
        if not executor.inflight:  # else it is given back by the examination, which must still find the lease
            self.effects.append(Release(executor))
        self._assign(pool, now_s)

    def unsent(self, executor: Executor, call: Call, now_s: float) -> None:
        """The executor was gone before the call could leave; its loss is reported separately."""
        executor.draining = True
        if executor.inflight.pop(call.number, None) is None:
            return
        if call.pool.sticky:
            self._examine(executor, call)
        else:
            self._put_back(call)
            self._assign(call.pool, now_s)

    def explained(self, call: Call, error: BaseException, now_s: float) -> None:
        """The site said why the executor of an examined call died."""
        if call.pool.sticky:
            call.pool.broken = error
            self._fail_queue(call.pool, error)
        if call.state is not State.EXAMINED:
            return
        if call.pool.sticky:
            self._settle(call, error)
        elif isinstance(error, EvictedError) and call.replayable:
            self._learn(call, now_s - call.sent_s)
            self._put_back(call)
        else:
            self._retry_or_settle(call, error, now_s)
        self._assign(call.pool, now_s)

    def drained(self, executor: Executor) -> None:
        """Its lease will end soon: send it nothing more."""
        executor.draining = True
        self._retire_if_drained(executor)

    def break_pool(self, pool: Pool, error: BaseException) -> None:
        """Settle every call of this pool, now and later, with this error; running ones are interrupted."""
        pool.broken = error
        self._fail_queue(pool, error)
        for executor in pool.executors.values():
            for call in list(executor.inflight.values()):
                self._settle_running(executor, call, error)

    # time ------------------------------------------------------------------------
    def next_timer_s(self) -> float:
        return self._timers.next_s()

    def tick(self, now_s: float) -> None:
        while (timer := self._timers.pop_due(now_s)) is not None:
            due, target = timer
            if isinstance(target, Call):
                self._call_due(due, target, now_s)
            elif due is Due.CLOSE and isinstance(target, Executor):
                self.effects.append(Close(target))
            elif isinstance(target, Executor):
                self._idle_due(target, now_s)
            elif due is Due.WARN:
                self._growing.warn_due(target, now_s)
            else:
                self._assign(target, now_s)

    def _call_due(self, due: Due, call: Call, now_s: float) -> None:
        if due is Due.KILL:
            self._kill_due(call, now_s)
        elif due is Due.RETRY and call.state is State.WAITING:
            self._requeue(call, now_s)
        elif due is Due.DEADLINE and call.state is not State.SETTLED and not call.abandoned:
            self._withdraw(call, b"timeout", now_s)
            self.effects.append(Settle(call, _late(call)))

    def _requeue(self, call: Call, now_s: float) -> None:
        if call.pool.broken is not None:
            self._settle(call, call.pool.broken)
            return
        self._enqueue(call)
        self._assign(call.pool, now_s)

    def _kill_due(self, call: Call, now_s: float) -> None:
        for executor in call.pool.executors.values():
            if call.number in executor.inflight:
                if next(iter(executor.inflight)) == call.number:
                    self.effects.append(Kill(executor))
                self._timers.at(now_s + KILL_GRACE_S, Due.KILL, call)

    def _idle_due(self, executor: Executor, now_s: float) -> None:
        pool = executor.pool
        if executor.name not in pool.executors:
            return
        limit_s = IDLE_S if len(pool.executors) > 1 else LAST_IDLE_S
        if not (executor.inflight or executor.claimed or pool.sticky) and now_s - executor.last_s >= limit_s:
            self._release(executor)
            return
        self._timers.at(max(executor.last_s + limit_s, now_s + IDLE_S / 2), Due.IDLE, executor)

    # inside ------------------------------------------------------------------------
    def _enqueue(self, call: Call, ahead: bool = False) -> None:
        pool, call.state = call.pool, State.QUEUED
        if not pool.queue:  # a wait ends with the last call that waited: this one's begins anew
            pool.waiting_s = pool.warn_s = NEVER
        if ahead:
            pool.queue.appendleft(call)
        else:
            pool.queue.append(call)

    def _assign(self, pool: Pool, now_s: float) -> None:
        queue = pool.queue
        while queue:
            executor = self._place(pool, queue[0], now_s)
            if executor is None:
                break
            call = queue.popleft()
            call.state, call.sent_s = State.SENT, now_s
            call.expected_s = self._expected_s.get(call.label, UNKNOWN_S)
            executor.load_s += call.expected_s
            executor.inflight[call.number] = call
            self.effects.append(Send(executor, call))
        if queue:
            self._growing.grow(pool, now_s, any(map(_has_room, pool.executors.values())))

    def _place(self, pool: Pool, call: Call, now_s: float) -> Executor | None:
        """An executor that is there for as long as the call may take; where none can be had, the one that is
        there longest.
        """
        need_s = self._longest_s.get(call.label, 0.0)
        executor = self._roomiest(pool, now_s + need_s)
        if executor is None and (need_s > pool.life_s or not self._growing.may_grow(pool, now_s)):
            roomy = filter(_has_room, pool.executors.values())
            return max(roomy, key=lambda one: one.closes_s, default=None)
        return executor

    def _roomiest(self, pool: Pool, until_s: float) -> Executor | None:
        """Of those that take calls until then."""
        best: Executor | None = None
        for executor in pool.executors.values():
            if executor.closes_s < until_s or not _has_room(executor):
                continue
            held = len(executor.inflight)
            if held == 0:
                return executor
            if best is None or executor.load_s < best.load_s:
                best = executor
        return best

    def release_idle(self, idle_s: float, now_s: float, spare: Pool | None = None) -> None:
        """Give back every executor that has been idle that long, so that others may have its cores."""
        for pool in self.pools.values():
            if pool is not spare and not pool.sticky:
                for executor in list(pool.executors.values()):
                    if not (executor.inflight or executor.claimed) and now_s - executor.last_s >= idle_s:
                        self._release(executor)

    def _retire_if_drained(self, executor: Executor) -> None:
        if executor.draining and not executor.inflight and executor.name in executor.pool.executors:
            self._release(executor)

    def _release(self, executor: Executor) -> None:
        del executor.pool.executors[executor.name]
        self.effects.append(Release(executor))

    def _measure(self, executor: Executor, call: Call, now_s: float) -> None:
        """A function's time, from the gap between answers; rises fast and falls slowly, to be careful in
        time.
        """
        sample_s = now_s - max(executor.last_s, call.sent_s)
        executor.last_s = now_s
        executor.load_s = executor.load_s - call.expected_s if executor.inflight else 0.0
        known_s = self._expected_s.get(call.label, sample_s)
        weight = 0.5 if sample_s > known_s else 0.2
        self._expected_s[call.label] = max(known_s + weight * (sample_s - known_s), 1e-7)
        if executor.closes_s < NEVER and (sample_s > LONG_S or call.label in self._longest_s):
            self._learn(call, sample_s)
            self._close_in_time(executor, executor.closes_s - self._longest_s[call.label])
        self._retire_if_drained(executor)

    def _close_in_time(self, executor: Executor, at_s: float) -> None:
        """Calls that go past this scheduler must not begin there from then on."""
        if at_s < executor.past_until_s:
            executor.past_until_s = at_s
            self._timers.at(at_s, Due.CLOSE, executor)

    def _learn(self, call: Call, sample_s: float) -> None:
        """What calls of one function may take: rises at once and falls slowly."""
        known_s = self._longest_s.get(call.label, sample_s)
        self._longest_s[call.label] = max(sample_s, known_s - 0.1 * (known_s - sample_s))

    def _withdraw(self, call: Call, reason: bytes, now_s: float) -> None:
        if call.state is State.SENT:
            call.abandoned = True
            self.abandoned += 1
            self._timers.at(now_s + KILL_GRACE_S, Due.KILL, call)
            for executor in call.pool.executors.values():
                if call.number in executor.inflight:
                    self.effects.append(Interrupt(executor, call, reason))
            self.outstanding -= 1
            return
        if call.state is State.QUEUED:
            call.pool.queue.remove(call)
        self._finish(call)

    def _break_sticky(self, pool: Pool, executor: Executor) -> None:
        """What lived in this executor is gone: no other may take its place."""
        pool.limit = 0
        if all(call.abandoned for call in executor.inflight.values()):  # nobody will examine it
            pool.broken = ExecutorLostError(
                f"executor {executor.name} died, and the state of its actor with it"
            )
            self._fail_queue(pool, pool.broken)

    def _settle_running(self, executor: Executor, call: Call, error: BaseException) -> None:
        if not call.abandoned:
            call.abandoned = True
            self.abandoned += 1
            self.outstanding -= 1
            self.effects += [Interrupt(executor, call, b"cancel"), Settle(call, error)]

    def _put_back(self, call: Call) -> None:
        if call.abandoned:
            self._finish(call)
        elif call.pool.broken is not None or (call.pool.sticky or not call.replayable):
            self._settle(call, call.pool.broken or EvictedError("the lease of this call was taken back"))
        else:
            self._enqueue(call, ahead=True)

    def _examine(self, executor: Executor, call: Call) -> None:
        call.state = State.EXAMINED
        self.effects.append(Examine(executor, call))

    def _retry_or_settle(self, call: Call, error: BaseException, now_s: float) -> None:
        again = call.attempts < call.retry.max and isinstance(error, call.retry.on)
        if call.abandoned or not again or not call.replayable:
            self._settle(call, error)
            return
        backoff_s = min(call.retry.backoff_s * 2**call.attempts, RETRY_BACKOFF_S_MAX)
        call.attempts += 1
        call.state = State.WAITING
        self._timers.at(now_s + backoff_s, Due.RETRY, call)

    def _fail_queue(self, pool: Pool, error: BaseException) -> None:
        pool.refusals = pool.silences = 0
        while pool.queue:
            self._settle(pool.queue.popleft(), error)

    def _settle(self, call: Call, error: BaseException) -> None:
        if self._finish(call):
            self.effects.append(Settle(call, error))

    def _finish(self, call: Call) -> bool:
        """Close the books on a call. False: it was settled before."""
        if call.state is State.SETTLED:
            return False
        call.state = State.SETTLED
        if call.abandoned:
            self.abandoned -= 1
        else:
            self.outstanding -= 1
        return not call.abandoned
