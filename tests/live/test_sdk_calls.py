"""Calls, futures, maps, streams and actors through a real embedded site."""

import asyncio
import concurrent.futures
import functools
import gc
import itertools
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import isthmus
from tests.live import sdk_functions as remote
from tests.live.waiting import wait_for


@pytest.fixture(scope="module")
def site() -> Iterator[isthmus.Site]:
    with isthmus.connect() as opened:
        yield opened


# values ----------------------------------------------------------------
def test_a_decorated_function_still_runs_here():
    assert remote.succeed_at_third.__name__ == "succeed_at_third"
    assert remote.square(3) == 9


@pytest.mark.parametrize(
    "value", [None, b"", b"x", "text", 1 << 80, [1, (2, {"k": None})], {1, 2}, float("inf")]
)
def test_values_come_back_as_they_were_sent(site, value):
    assert site.call(remote.same, value) == value
    assert site.submit(remote.same, value).result() == value


def test_arrays_come_back_equal_and_of_the_same_type(site):
    array = np.arange(300_000, dtype=np.float32).reshape(3, -1)
    back = site.call(remote.same, array)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


def test_a_payload_of_256_mib_arrives_whole(site):
    assert site.call(remote.length, bytes(256 << 20)) == 256 << 20


@pytest.mark.parametrize(
    "fn", [abs, functools.partial(pow, -2, 1), "abc".count, lambda value: value], ids=str
)
def test_any_callable_can_be_called(site, fn):
    argument = "c" if fn == "abc".count else 5
    if isinstance(fn, functools.partial):
        assert site.call(fn) == -2
        return
    assert site.call(fn, argument) == fn(argument)


def test_a_closure_made_anew_for_each_call_has_its_own_values(site):
    assert [site.call(lambda number=number: number * 2) for number in range(50)] == list(range(0, 100, 2))


def test_arguments_that_cannot_travel_are_named(site):
    with pytest.raises(isthmus.CodecError, match="lock"):
        site.call(remote.same, threading.Lock())


def test_a_function_from_a_module_the_executor_lacks_says_which(site, tmp_path):
    code = "def lost():\n    return 1\n"
    namespace: dict[str, object] = {"__name__": "only_here"}
    exec(code, namespace)
    module = type(os)("only_here")
    module.__dict__.update(namespace)
    import sys

    sys.modules["only_here"] = module
    try:
        with pytest.raises(isthmus.FunctionLoadError, match="only_here"):
            site.call(module.lost)
    finally:
        del sys.modules["only_here"]


# errors ----------------------------------------------------------------
def test_an_exception_is_itself_with_the_remote_traceback(site):
    with pytest.raises(ValueError, match="3 is a multiple") as caught:
        site.call(remote.refuse_thirds, 3)
    assert "refuse_thirds" in str(caught.value.__cause__)


def test_retries_are_for_the_named_exceptions_only(site, tmp_path):
    assert site.call(remote.succeed_at_third, str(tmp_path / "calls")) == 3
    counter = str(tmp_path / "other")
    future = site.submit(remote.count_up, counter, retries=isthmus.Retry(max=2))
    assert future.result() == 1


@pytest.mark.parametrize(
    ("fn", "args", "words"), [(remote.die, (), "SIGKILL"), (remote.quit_with, (3,), "exit code 3")]
)
def test_a_lost_executor_is_explained_and_replaced(site, fn, args, words):
    with pytest.raises(isthmus.ExecutorLostError, match=words):
        site.call(fn, *args)
    assert site.call(remote.square, 5) == 25


def test_timeouts_end_running_code_and_its_executor_goes_on(site):
    began_s = time.monotonic()
    with pytest.raises(isthmus.CallTimeoutError, match=r"overrun did not end within timeout_s=0\.2"):
        site.call(remote.overrun)
    with pytest.raises(TimeoutError):
        site.submit(remote.nap, 60, timeout_s=0.1).result()
    assert site.call(remote.square, 2) == 4
    assert time.monotonic() - began_s < 5


def test_a_wait_that_ends_early_leaves_the_call_running(site):
    future = site.submit(remote.nap, 0.3)
    with pytest.raises(TimeoutError):
        future.result(timeout_s=0.01)
    assert future.result() == 0.3


def test_cancelling_a_running_call_runs_its_cleanup(site, tmp_path):
    mark = tmp_path / "cleaned"
    future = site.submit(remote.leave_when_interrupted, str(mark))
    wait_for(Path(f"{mark}.begun").exists)
    assert future.cancel()
    assert future.cancelled()
    wait_for(mark.exists)
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


def test_code_that_ignores_cancellation_is_killed(site, tmp_path):
    mark = tmp_path / "begun"
    future = site.submit(remote.ignore_interruption, str(mark))
    wait_for(mark.exists)
    assert future.cancel()
    assert site.submit(remote.square, 3).result(timeout_s=20) == 9


def test_a_queued_call_can_be_cancelled_and_never_runs(site, tmp_path):
    blockers = [site.submit(remote.nap, 0.3) for _ in range(8)]
    mark = tmp_path / "ran"
    future = site.submit(remote.count_up, str(mark))
    assert future.cancel()
    assert all(blocker.result() for blocker in blockers)
    assert not mark.exists()


# waiting ----------------------------------------------------------------
def test_futures_work_with_wait_and_as_completed(site):
    futures = [site.submit(remote.square, number) for number in range(20)]
    done, pending = concurrent.futures.wait(futures, timeout=10)
    assert not pending
    assert {future.result() for future in concurrent.futures.as_completed(futures)} == {
        n * n for n in range(20)
    }
    assert len(done) == 20


def test_futures_can_be_awaited(site):
    async def main() -> list[int]:
        return await asyncio.gather(*(site.submit(remote.square, number) for number in range(50)))

    assert asyncio.run(main()) == [number**2 for number in range(50)]


def test_cancelling_an_awaiting_task_cancels_the_call(site, tmp_path):
    mark = tmp_path / "cleaned"
    future = site.submit(remote.leave_when_interrupted, str(mark))
    wait_for(Path(f"{mark}.begun").exists)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(future), 0.05)

    asyncio.run(main())
    wait_for(mark.exists)


def test_coroutine_functions_run_on_the_executor(site):
    assert site.call(remote.later, 7) == 7
    assert [future.result() for future in [site.submit(remote.later, n) for n in range(5)]] == list(range(5))


def test_fifty_threads_call_at_once(site):
    results: list[int] = []

    def work(seed: int) -> None:
        results.extend(site.call(remote.square, seed + number) - (seed + number) ** 2 for number in range(20))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [0] * 1000


# maps ----------------------------------------------------------------
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_a_map_gives_results_in_order(site, chunk):
    assert list(site.map(remote.square, range(500), chunk=chunk)) == [number**2 for number in range(500)]


def test_an_unordered_map_gives_all_results(site):
    assert sorted(site.map(remote.square, range(500), ordered=False)) == [number**2 for number in range(500)]


def test_a_map_takes_several_iterables_and_stops_with_the_shortest(site):
    assert list(site.map(pow, [2, 3, 4], itertools.count(1))) == [2, 9, 64]


def test_an_endless_map_reads_no_further_than_its_window(site):
    read = 0

    def source() -> Iterator[int]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield number

    results = site.map(remote.square, source(), chunk=1)
    assert list(itertools.islice(results, 100)) == [number**2 for number in range(100)]
    results.close()
    assert read < 1000


def test_failures_of_a_map_are_reported_together_after_the_rest(site):
    got = []
    with pytest.raises(isthmus.MapError) as caught:
        got.extend(site.map(remote.refuse_thirds, range(10)))
    assert [index for index, _ in caught.value.failures] == [0, 3, 6, 9]


def test_failures_can_come_in_place(site):
    got = list(site.map(remote.refuse_thirds, range(4), return_exceptions=True))
    assert [type(one) for one in got] == [ValueError, int, int, ValueError]


def test_an_item_that_cannot_travel_fails_alone(site):
    items = [1, threading.Lock(), 3]
    got = list(site.map(remote.same, items, chunk=3, return_exceptions=True))
    assert [type(one) for one in got] == [int, isthmus.CodecError, int]


def test_a_map_shows_its_progress(site, capsys):
    assert len(list(site.map(remote.square, range(10), progress=True))) == 10
    assert "10/10" in capsys.readouterr().out


# streams ----------------------------------------------------------------
def test_a_generator_streams_its_items(site):
    assert list(site.stream(remote.numbers, 1000)) == list(range(1000))
    assert list(site.stream(remote.slow_numbers, 100)) == list(range(100))


def test_a_stream_can_be_read_with_async_for(site):
    async def main() -> list[int]:
        return [number async for number in site.stream(remote.slow_numbers, 100)]

    assert asyncio.run(main()) == list(range(100))


def test_a_stream_raises_what_its_generator_raised_after_the_items(site):
    stream = site.stream(remote.break_after, 3)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no more"):
        next(stream)
    assert list(stream) == []


@pytest.mark.parametrize("end", ["close", "drop"])
def test_leaving_a_stream_ends_its_generator(site, tmp_path, end):
    mark = tmp_path / "ended"
    stream = site.stream(remote.endless, str(mark))
    assert [next(stream) for _ in range(100)] == list(range(100))
    if end == "close":
        stream.close()
    else:
        del stream
        gc.collect()
    wait_for(mark.exists)


def test_a_kept_error_of_an_actor_does_not_keep_its_cores(site):
    actor = site.actor(remote.Counter)
    alive = weakref.ref(actor)
    with pytest.raises(AttributeError) as kept:
        actor.nope.call()
    del actor
    assert kept.value.__traceback__ is not None
    assert alive() is None


def test_what_is_no_id_of_a_call_reaches_nothing_else(site):
    with pytest.raises(isthmus.NotFoundError):
        site.result("../leases", timeout_s=10)


def test_streaming_a_plain_function_says_to_call_it(site):
    with pytest.raises(isthmus.InvalidRequestError, match=r"site\.call"):
        site.stream(remote.square, 7)


def test_calling_a_generator_function_says_to_stream_it(site):
    with pytest.raises(isthmus.InvalidRequestError, match="stream"):
        site.call(remote.numbers, 3)


# actors ----------------------------------------------------------------
def test_an_actor_keeps_its_state_and_runs_enter_and_exit(site, tmp_path):
    mark = tmp_path / "exited"
    with site.actor(remote.Counter, 10) as counter:
        assert [future.result() for future in [counter.add(1) for _ in range(20)]] == list(range(11, 31))
        assert counter.leave_mark.call(str(mark)) == ["entered", str(mark)]
        assert list(counter.upto.stream()) == list(range(30))
    wait_for(mark.exists)
    with pytest.raises(isthmus.LeaseEndedError, match="closed"):
        counter.add.call(1)


def test_an_actor_whose_making_fails_raises_that(site):
    with pytest.raises(ValueError, match="below zero"):
        site.actor(remote.Counter, -1)


def test_a_dead_actor_says_so_for_every_call(site):
    with site.actor(remote.Counter) as counter:
        with pytest.raises(isthmus.ExecutorLostError):
            counter.die.call()
        with pytest.raises(isthmus.ExecutorLostError):
            counter.add.call(1)


def test_a_native_function_whose_library_is_missing_says_so(site):
    with pytest.raises(isthmus.FunctionLoadError, match=r"checksum.*libnone\.so"):
        site.call(isthmus.native("/nowhere/libnone.so", "checksum"), b"bytes")


# nested and durable calls ----------------------------------------------------------------
def test_nested_calls_need_no_free_capacity(site):
    assert list(site.map(remote.call_nested, range(4))) == [0, 1, 4, 9]
    assert site.call(remote.call_deeper, 3) == 3


def test_a_durable_call_has_one_result_for_its_key(site, tmp_path):
    counter = str(tmp_path / "calls")
    futures = [site.submit(remote.count_up, counter, durable=True, idempotency_key="k") for _ in range(3)]
    assert [future.result(timeout_s=20) for future in futures] == [1, 1, 1]
    assert site.result(futures[0].call_id, timeout_s=20) == 1
    with pytest.raises(isthmus.InvalidRequestError, match="take another for"):
        site.submit(remote.square, 7, idempotency_key="k")


def test_a_durable_call_raises_what_the_function_raised(site):
    with pytest.raises(ValueError, match="multiple of three"):
        site.submit(remote.refuse_thirds, 3, durable=True).result(timeout_s=20)


# life ----------------------------------------------------------------
def test_seeing_leases_bill_and_latencies(site):
    # a call that finds another thread at the fabric takes the longer way, which is not timed
    for _ in range(50):
        site.call(remote.square, 1)
    assert site.leases()
    assert sum(row.leases for row in site.bill()) >= 1
    report = site.latency()
    assert report.cold.calls + report.warm.calls + report.hot.calls >= 2


def test_a_site_is_unusable_in_a_forked_child(site):
    site.call(remote.square, 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            site.call(remote.square, 1)
        except isthmus.FabricError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as words:
        assert b"fork" in words.read()
    assert site.call(remote.square, 3) == 9


def test_a_dropped_site_lets_its_last_call_end_and_gives_its_leases_back(site, tmp_path):
    other = isthmus.connect()
    mark = tmp_path / "written"
    future = other.submit(remote.write_later, str(mark), 0.2)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    future.result(timeout_s=45)  # the module's site may hold all cores until they were idle for long
    assert mark.read_text() == "apple"


def test_a_closed_site_refuses_and_cancels_what_was_outstanding(site):
    other = isthmus.connect()
    other.call(remote.square, 1)
    future = other.submit(remote.nap, 60)
    other.close()
    assert future.cancelled()
    with pytest.raises(isthmus.LeaseEndedError, match="closed"):
        other.call(remote.square, 1)
    other.close()


class Stubborn:
    async def stay(self) -> str:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            return "stayed"
        return "slept"

    async def rest(self, duration_s: float) -> str:
        await asyncio.sleep(duration_s)
        return "rested"


def test_a_call_that_swallows_its_cancel_leaves_none_for_the_next(site):
    """What was meant for a call that went on to succeed must not hit the call after it."""
    with site.actor(Stubborn) as actor:
        for _ in range(3):
            stubborn = actor.stay()
            while not stubborn.running():
                time.sleep(0.005)
            time.sleep(0.05)
            stubborn.cancel()
            resting = actor.rest(0.3)
            queued = actor.rest(0.0)
            time.sleep(0.1)
            queued.cancel()  # a signal while the other rests
            assert resting.result(timeout_s=20) == "rested"


def spun(turns: int) -> int:
    for _ in range(turns):
        pass
    return turns


def test_cancels_at_random_moments_hit_nobody_else(site):
    """Signals arrive between any two steps of the executor; only the call that was meant may feel one."""
    chance = random.Random(20)
    kept, cancelled = [], []
    for _ in range(600):
        victim = site.submit(spun, chance.randrange(20_000))
        kept.append((turns := chance.randrange(2_000), site.submit(spun, turns)))
        spun(chance.randrange(20_000))
        victim.cancel()
        cancelled.append(victim)
    assert [future.result(timeout_s=30) for _, future in kept] == [turns for turns, _ in kept]
    outcomes = [victim.exception(timeout=30) if not victim.cancelled() else None for victim in cancelled]
    assert all(outcome is None or isinstance(outcome, isthmus.CallCancelledError) for outcome in outcomes)
    assert any(victim.cancelled() for victim in cancelled)
