"""The scheduler core against a random world: executors that come, die, refuse, drain; calls that fail and
time out.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isthmus.core.errors import (
    CallTimeoutError,
    DeniedError,
    EvictedError,
    ExecutorLostError,
    IsthmusError,
    NoCapacityError,
    PeerLostError,
    SiteUnavailableError,
)
from isthmus.sdk import dispatch, growing, work
from isthmus.sdk.dispatch import Dispatch
from isthmus.sdk.function import Retry
from isthmus.sdk.work import NEVER, Call, Executor, Pool

CAPACITY_WAIT_S = 600.0


class World(RuleBasedStateMachine):
    """Carries effects out against a model and checks what must hold after every step."""

    @initialize(limit=st.integers(1, 4), sticky=st.booleans())
    def begin(self, limit: int, sticky: bool) -> None:
        self.now_s = 100.0
        self.core = Dispatch(CAPACITY_WAIT_S)
        self.pool: Pool = self.core.pool("pool", None, 1 if sticky else limit, sticky)
        self.executors: list[Executor] = []
        self.examined: list[Call] = []
        self.request: work.Request | None = None
        self.calls: list[Call] = []
        self.outcomes: dict[int, list[str]] = {}
        self.sent: dict[int, int] = {}
        self.grants = 0

    # what the world does ----------------------------------------------------------------
    @rule(retries=st.integers(0, 2), timeout_s=st.sampled_from([NEVER, 0.5, 30.0]))
    def submit(self, retries: int, timeout_s: float) -> None:
        call = Call(len(self.calls), self.pool, None, Retry(max=retries), self.now_s + timeout_s)
        self.calls.append(call)
        self.outcomes[call.number] = []
        self.core.submit(call, self.now_s)

    @precondition(lambda self: self.request is not None)
    @rule(open_s=st.sampled_from([NEVER, 2.0, 500.0]))
    def grant(self, open_s: float) -> None:
        assert self.request is not None
        leases, self.request = self.request.leases, None
        executors = [
            Executor(f"ex{self.grants + position}", self.pool, None, closes_s=self.now_s + open_s)
            for position in range(leases)
        ]
        self.grants += leases
        self.executors += executors
        self.core.granted(self.pool, executors, self.now_s)

    @precondition(lambda self: self.request is not None)
    @rule(kind=st.sampled_from([NoCapacityError, SiteUnavailableError, DeniedError]))
    def refuse(self, kind: type[IsthmusError]) -> None:
        self.request = None
        self.core.refused(self.pool, kind("no"), self.now_s)

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        executor, number = self.oldest(data)
        call = self.core.answered(executor, number, self.now_s)
        if call is not None:
            self.outcomes[call.number].append("result")

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        executor, number = self.oldest(data)
        self.core.failed(executor, number, ValueError("its own"), self.now_s)

    @precondition(lambda self: self.busy())
    @rule(data=st.data())
    def turn_back(self, data: st.DataObject) -> None:
        executor, number = self.oldest(data)
        self.core.turned_back(executor, number, self.now_s)

    @precondition(lambda self: self.executors)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        executor = data.draw(st.sampled_from(self.executors))
        self.executors.remove(executor)
        self.core.lost(executor, self.now_s)

    @precondition(lambda self: self.examined)
    @rule(evicted=st.booleans())
    def explain(self, evicted: bool) -> None:
        error = EvictedError("owner woke") if evicted else ExecutorLostError("exit code 3")
        self.core.explained(self.examined.pop(0), error, self.now_s)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        call = data.draw(st.sampled_from(self.calls))
        if self.core.cancel(call, self.now_s):
            self.outcomes[call.number].append("cancelled")

    @rule(step_s=st.sampled_from([0.001, 0.3, 3.0, 200.0]))
    def pass_time(self, step_s: float) -> None:
        self.now_s += step_s
        self.core.tick(self.now_s)

    # what must hold ----------------------------------------------------------------
    @invariant()
    def carry_out(self) -> None:
        while self.core.effects:
            for effect in self.core.take_effects():
                self.carry_out_one(effect)

    def carry_out_one(self, effect: work.Effect) -> None:
        match effect:
            case work.Send(executor, call):
                assert executor in self.executors, "sent to an executor that is gone"
                assert not self.outcomes[call.number], "sent although settled"
                self.sent[call.number] = self.sent.get(call.number, 0) + 1
            case work.Settle(call, error):
                self.outcomes[call.number].append(type(error).__name__)
            case work.Request():
                assert self.request is None, "two requests at once"
                assert effect.leases + len(self.pool.executors) <= self.pool.limit
                self.request = effect
            case work.Examine(_, call):
                self.examined.append(call)
            case work.Release(executor) if executor in self.executors:
                self.executors.remove(executor)

    @invariant()
    def windows_hold(self) -> None:
        for executor in self.executors:
            assert len(executor.inflight) <= dispatch.WINDOW_MAX

    @invariant()
    def nothing_is_settled_twice(self) -> None:
        assert all(len(outcomes) <= 1 for outcomes in self.outcomes.values())

    @invariant()
    def the_count_is_right(self) -> None:
        waiting = sum(not outcomes for outcomes in self.outcomes.values())
        assert self.core.outstanding == waiting, (self.core.outstanding, waiting)

    @invariant()
    def retries_stay_in_their_budget(self) -> None:
        assert all(call.attempts <= call.retry.max for call in self.calls)

    def teardown(self) -> None:
        """A kinder world from here on: everything must come to its end."""
        if not hasattr(self, "core"):
            return
        for _ in range(10_000):
            self.carry_out()
            if self.core.outstanding == 0:
                break
            self.be_kind()
        assert all(len(outcomes) == 1 for outcomes in self.outcomes.values()), self.outcomes

    def be_kind(self) -> None:
        if self.request is not None:
            self.grant(NEVER)
        elif self.examined:
            self.core.explained(self.examined.pop(0), ExecutorLostError("gone"), self.now_s)
        elif self.busy():
            executor = next(one for one in self.executors if one.inflight)
            call = self.core.answered(executor, next(iter(executor.inflight)), self.now_s)
            if call is not None:
                self.outcomes[call.number].append("result")
        else:
            self.pass_time(3.0)

    def busy(self) -> bool:
        return any(executor.inflight for executor in self.executors)

    def oldest(self, data: st.DataObject) -> tuple[Executor, int]:
        executor = data.draw(st.sampled_from([one for one in self.executors if one.inflight]))
        return executor, next(iter(executor.inflight))


World.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestWorld = World.TestCase


def pool_with(core: Dispatch, executors: int) -> Pool:
    pool = core.pool("pool", None, limit=executors)
    core.granted(pool, [Executor(f"ex{number}", pool, None) for number in range(executors)], 0.0)
    return pool


def sends(core: Dispatch) -> list[work.Send]:
    effects = core.take_effects()
    return [effect for effect in effects if isinstance(effect, work.Send)]


def test_an_unknown_function_is_sent_one_at_a_time_until_its_time_is_known():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = pool_with(core, 1)
    for number in range(10):
        core.submit(Call(number, pool, None, Retry()), 0.0)
    (send,) = sends(core)
    core.answered(send.executor, 0, 10e-6)
    assert len(sends(core)) == 9


def test_long_calls_are_never_queued_behind_each_other():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = pool_with(core, 2)
    for number in range(10):
        core.submit(Call(number, pool, None, Retry()), 0.0)
    first, second = sends(core)
    core.answered(first.executor, first.call.number, 1.0)
    core.answered(second.executor, second.call.number, 1.0)
    assert len(sends(core)) == 2


def test_an_eviction_costs_no_retry():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = pool_with(core, 1)
    call = Call(0, pool, None, Retry(max=0))
    core.submit(call, 0.0)
    (send,) = sends(core)
    core.lost(send.executor, 1.0)
    core.explained(call, EvictedError("owner woke"), 1.0)
    assert call.attempts == 0
    assert call.state is work.State.QUEUED


def test_calls_behind_the_one_that_killed_the_executor_run_elsewhere():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = pool_with(core, 1)
    core.submit(Call(0, pool, None, Retry()), 0.0)
    (send,) = sends(core)
    core.answered(send.executor, 0, 1e-5)
    for number in (1, 2, 3):
        core.submit(Call(number, pool, None, Retry()), 1e-5)
    core.effects.clear()
    core.lost(send.executor, 1.0)
    examined = [effect.call.number for effect in core.effects if isinstance(effect, work.Examine)]
    assert examined == [1]
    assert [call.number for call in pool.queue] == [2, 3]


def test_a_running_call_that_ignores_its_timeout_is_killed_after_the_grace():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = pool_with(core, 1)
    core.submit(Call(0, pool, None, Retry(), deadline_s=1.0), 0.0)
    core.effects.clear()
    core.tick(1.0)
    kinds = [type(effect) for effect in core.effects]
    assert kinds == [work.Interrupt, work.Settle]
    assert isinstance(core.effects[1].error, CallTimeoutError)
    core.effects.clear()
    core.tick(1.0 + dispatch.KILL_GRACE_S)
    assert [type(effect) for effect in core.effects] == [work.Kill]


def test_idle_executors_are_given_back_and_the_last_one_last():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = pool_with(core, 2)
    core.tick(dispatch.IDLE_S)
    assert len(pool.executors) == 1
    core.tick(dispatch.LAST_IDLE_S + dispatch.IDLE_S)
    assert not pool.executors


def test_another_pools_idle_executors_make_room_when_nothing_is_free():
    core = Dispatch(CAPACITY_WAIT_S)
    pool_with(core, 2)
    other = core.pool("other", None, limit=2)
    core.submit(Call(0, other, None, Retry()), 1.0)
    core.effects.clear()
    core.refused(other, NoCapacityError("full"), 1.0)
    assert [type(effect) for effect in core.effects] == [work.Release, work.Release, work.Request]


def test_a_wait_shorter_than_the_sites_queue_is_no_longer_there():
    core = Dispatch(capacity_wait_s=5.0)
    pool = core.pool("pool", None, limit=2)
    core.submit(Call(0, pool, None, Retry()), 0.0)
    core.refused(pool, NoCapacityError("full"), 1.0)
    assert [effect.wait_s for effect in core.effects if isinstance(effect, work.Request)] == [0.0, 5.0]
    core.refused(pool, NoCapacityError("full"), 6.0)
    assert isinstance(core.effects[-1], work.Settle)


def test_calls_that_wait_long_for_an_executor_are_told_of_ever_more_rarely():
    core = Dispatch(capacity_wait_s=600.0)
    pool = core.pool("pool", None, limit=1)
    core.submit(Call(0, pool, None, Retry()), 0.0)
    for now_s in range(100):
        core.tick(float(now_s))
    told = [effect.waited_s for effect in core.effects if isinstance(effect, work.Warn)]
    assert told == [growing.WARN_S, 2 * growing.WARN_S, 4 * growing.WARN_S, 8 * growing.WARN_S]
    core.effects.clear()
    core.granted(pool, [Executor("ex", pool, None)], 100.0)
    core.tick(1000.0)
    assert not [effect for effect in core.effects if isinstance(effect, work.Warn)]


def test_a_wait_for_an_executor_begins_anew_when_nobody_waited_any_more():
    core = Dispatch(capacity_wait_s=600.0)
    pool = core.pool("pool", None, limit=1)
    first = Call(0, pool, None, Retry())
    core.submit(first, 0.0)
    core.cancel(first, 5.0)
    core.submit(Call(1, pool, None, Retry()), 8.0)
    told = []
    for now_s in range(9, 40):
        core.tick(float(now_s))
        told += [(now_s, effect.waited_s) for effect in core.effects if isinstance(effect, work.Warn)]
        core.effects.clear()
    assert told == [(18, growing.WARN_S), (28, 2 * growing.WARN_S)], "the request is still under way"


def test_a_call_waits_its_turn_and_fails_in_the_end():
    core = Dispatch(capacity_wait_s=100.0)
    pool = core.pool("pool", None, limit=2)
    core.submit(Call(0, pool, None, Retry()), 0.0)
    waits_s = []
    for now_s in (1.0, 50.0, 100.0):
        waits_s += [effect.wait_s for effect in core.effects if isinstance(effect, work.Request)]
        core.effects.clear()
        core.refused(pool, NoCapacityError("full"), now_s)
        core.tick(now_s + growing.GROW_PAUSE_S_MAX)
    asked_at_s = 50.0 + growing.GROW_PAUSE_S_MAX
    assert waits_s == [0.0, growing.QUEUE_WAIT_S, 101.0 - asked_at_s], "the last one only until it must end"
    core.effects.clear()
    core.refused(pool, NoCapacityError("still full"), 101.0)
    (settle,) = core.effects
    assert isinstance(settle, work.Settle)
    assert str(settle.error) == "still full"


def test_a_site_that_restarts_meanwhile_ends_no_wait():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = core.pool("pool", None, limit=2)
    core.submit(Call(0, pool, None, Retry()), 0.0)
    now_s = 0.0
    for error in (
        [NoCapacityError("full")] * 4 + [SiteUnavailableError("down")] * 2 + [NoCapacityError("full")]
    ):
        (request,) = (effect for effect in core.effects if not isinstance(effect, work.Warn))
        assert isinstance(request, work.Request)
        core.effects.clear()
        now_s += 1.0
        core.refused(pool, error, now_s)
        now_s += growing.GROW_PAUSE_S_MAX
        core.tick(now_s)
    assert pool.queue


def test_executors_that_are_gone_before_they_are_reached_are_asked_for_again():
    core = Dispatch(CAPACITY_WAIT_S)
    pool = core.pool("pool", None, limit=2)
    core.submit(Call(0, pool, None, Retry()), 0.0)
    for attempt in range(growing.GRANT_ATTEMPTS_MAX):
        (request,) = (effect for effect in core.effects if not isinstance(effect, work.Warn))
        assert isinstance(request, work.Request)
        core.effects.clear()
        core.refused(pool, PeerLostError("gone"), 10.0 * attempt)
        core.tick(10.0 * attempt + growing.GROW_PAUSE_S_MAX)
    settle = core.effects[-1]
    assert isinstance(settle, work.Settle)
    assert str(settle.error) == "gone"


# executors that close ---------------------------------------------------------------------------------------
def _closing(core: Dispatch, *closes_s: float, limit: int = 4) -> tuple[Pool, list[Executor]]:
    """A pool with executors that close then, and a function (label 7) that takes 100 s by experience."""
    pool = core.pool("pool", None, limit)
    executors = [Executor(f"ex{one:g}", pool, None, closes_s=one) for one in closes_s]
    core.granted(pool, executors, 0.0)
    core.submit(_long_call(pool, 0), 0.0)
    (sent,) = (effect for effect in core.take_effects() if isinstance(effect, work.Send))
    core.answered(sent.executor, 0, 100.0)
    core.take_effects()
    return pool, executors


def _long_call(pool: Pool, number: int) -> Call:
    return Call(number, pool, None, Retry(max=0), label=7)


def _sent_to(core: Dispatch) -> list[str]:
    return [effect.executor.name for effect in core.take_effects() if isinstance(effect, work.Send)]


def test_a_call_begins_where_it_can_end() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool, _ = _closing(core, 180.0, 900.0)
    core.submit(_long_call(pool, 1), 100.0)
    assert _sent_to(core) == ["ex900"]


def test_a_call_that_can_end_nowhere_waits_for_another_executor() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool, _ = _closing(core, 180.0)
    core.submit(_long_call(pool, 1), 100.0)
    assert [type(effect) for effect in core.take_effects()] == [work.Request]
    core.granted(pool, [Executor("ex900", pool, None, closes_s=900.0)], 101.0)
    assert _sent_to(core) == ["ex900"]


def test_a_short_call_on_executors_that_have_closed_asks_for_another() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool = core.pool("pool", None, 2)
    core.granted(pool, [Executor("ex2", pool, None, closes_s=2.0)], 0.0)
    core.submit(Call(0, pool, None, Retry()), 0.0)
    core.answered(sends(core)[0].executor, 0, 1e-6)
    core.submit(Call(1, pool, None, Retry()), 3.0)
    assert [type(effect) for effect in core.take_effects()] == [work.Request], "however short the queue"
    core.granted(pool, [Executor("ex900", pool, None, closes_s=900.0)], 3.1)
    assert _sent_to(core) == ["ex900"]


def test_a_call_for_which_there_is_no_other_executor_begins_where_it_may_not_end() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool, _ = _closing(core, 150.0, 180.0)
    core.submit(_long_call(pool, 1), 100.0)
    core.refused(pool, NoCapacityError("full"), 100.1)
    assert _sent_to(core) == ["ex180"], "the one that is there longest"


def test_executors_that_would_not_do_either_are_not_hoarded() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool, _ = _closing(core, 180.0, limit=8)
    core.submit(_long_call(pool, 1), 100.0)
    core.take_effects()
    core.granted(pool, [Executor("ex190", pool, None, closes_s=190.0)], 101.0)
    effects = core.take_effects()
    assert [effect.executor.name for effect in effects if isinstance(effect, work.Send)] == ["ex190"]
    assert not [effect for effect in effects if isinstance(effect, work.Request)]


def test_a_pool_at_its_limit_uses_what_it_has() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool, _ = _closing(core, 180.0, limit=1)
    core.submit(_long_call(pool, 1), 100.0)
    assert _sent_to(core) == ["ex180"]


def test_nothing_goes_past_the_scheduler_where_it_may_not_end() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool, (executor,) = _closing(core, 900.0, limit=1)
    core.tick(799.0)
    assert not [effect for effect in core.take_effects() if isinstance(effect, work.Close)]
    core.submit(_long_call(pool, 1), 799.0)
    core.tick(800.0)
    assert work.Close(executor) in core.take_effects()


def test_a_call_that_was_evicted_needs_at_least_as_long_again() -> None:
    core = Dispatch(CAPACITY_WAIT_S)
    pool = core.pool("pool", None, 4)
    first = Executor("ex50", pool, None, closes_s=50.0)
    core.granted(pool, [first], 0.0)
    call = _long_call(pool, 1)
    core.submit(call, 0.0)
    core.lost(first, 50.0)
    core.take_effects()
    core.granted(pool, [Executor("ex80", pool, None, closes_s=80.0)], 50.0)
    core.granted(pool, [Executor("ex500", pool, None, closes_s=500.0)], 50.0)
    core.explained(call, EvictedError("its time was over"), 50.5)
    assert _sent_to(core) == ["ex500"]
