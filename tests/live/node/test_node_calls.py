"""What an executor does with calls of every kind, and with functions that misbehave."""

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped]

import isthmus.fabric
from isthmus.core.errors import (
    CallCancelledError,
    CodecError,
    EvictedError,
    FunctionLoadError,
    RemoteError,
)
from isthmus.core.model import EndReason, Resources
from isthmus.fabric.frames import Kind
from isthmus.node.messages import (
    DrainLease,
    EndLease,
    Heartbeat,
    LeaseReport,
    ReadLog,
)
from tests.live.node.conftest import address_of, define_twice, lease_numbers
from tests.live.node_peer import (
    Client,
    Site,
    ended,
    start_lease,
)


def test_a_function_is_called_with_its_arguments_and_gives_its_result(client: Client) -> None:
    join = client.define(lambda *parts, end="": "-".join(parts) + end)
    assert client.call(join, "a", "b", end="!") == "a-b!"


def test_arrays_travel_both_ways(client: Client) -> None:
    double = client.define(lambda array: array * 2)
    array = np.arange(200_000, dtype=np.float64)
    np.testing.assert_array_equal(client.call(double, array), array * 2)


def test_calls_sent_at_once_are_answered_in_order(client: Client) -> None:
    same = client.define(lambda value: value)
    calls = [client.start(same, number) for number in range(200)]
    assert [client.result(call) for call in calls] == list(range(200))


def test_an_exception_comes_back_as_itself_with_the_remote_traceback(client: Client) -> None:
    def fail() -> None:
        raise KeyError("nothing here")

    with pytest.raises(KeyError, match="nothing here") as caught:
        client.call(client.define(fail))
    remote = str(caught.value.__cause__)
    assert "in fail" in remote
    assert "serving.py" not in remote


def test_a_result_that_cannot_travel_is_a_codec_error(client: Client) -> None:
    with pytest.raises(CodecError):
        client.call(client.define(threading.Lock))


def test_keyboard_interrupt_travels_as_an_error(client: Client) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.call(client.define(interrupt))
    assert client.call(client.define(lambda: 1)) == 1


def test_a_function_whose_module_is_missing_fails_at_each_call(client: Client) -> None:
    # a pickle that imports a module nobody has
    function = client.define(None, name="lost", kind="function")
    broken = b"\x80\x05\x8c\x0bno_such_modX\x8c\x01f\x93."[:0] + b"cno_such_module\nf\n."
    header = isthmus.fabric.codec.encode_header(isthmus.fabric.codec.FunctionHeader(name="lost"))
    client.channel.send(Kind.DEFINE, 0, function, header, [broken])
    for _ in range(2):
        with pytest.raises(FunctionLoadError, match="no_such_module"):
            client.call(function)


def test_a_call_of_an_undefined_function_is_refused_by_name(client: Client) -> None:
    with pytest.raises(FunctionLoadError, match="no function 77"):
        client.call(77)


def test_coroutines_share_one_loop_that_lives_between_calls(client: Client) -> None:
    async def loop_id() -> int:
        await asyncio.sleep(0)
        return id(asyncio.get_running_loop())

    function = client.define(loop_id)
    assert client.call(function) == client.call(function)


def test_a_generator_sends_no_more_than_its_credits(client: Client) -> None:
    def count(limit: int) -> Iterator[int]:
        yield from range(limit)

    call = client.start(client.define(count), 10, credits=3)
    client.frame(call), client.frame(call), client.frame(call)
    assert client.domain.poll(0.2) is None
    client.send(Kind.YIELD, call, 0, b"", [], credits=3)
    assert list(client.items(call, 3)) == list(range(3, 10))


def test_a_generator_that_is_cancelled_is_closed(client: Client, site: Site, lease: str) -> None:
    def forever() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            print("closed")

    call = client.start(client.define(forever), credits=1)
    client.frame(call)
    client.cancel(call)
    with pytest.raises(CallCancelledError):
        list(client.items(call, 1))
    assert "closed" in site.done(ReadLog, lease=lease, offset=0).text


def test_an_asynchronous_generator_streams(client: Client) -> None:
    async def count(limit: int):  # type: ignore[no-untyped-def]
        for number in range(limit):
            await asyncio.sleep(0)
            yield number

    assert list(client.items(client.start(client.define(count), 50, credits=8), 8)) == list(range(50))


def test_an_actor_keeps_state_enters_once_and_exits_once(site: Site, lease: str) -> None:
    class Counter:
        def __init__(self, start: int) -> None:
            self.value = start

        def enter(self) -> None:
            print("enter")

        def leave(self) -> None:
            print("exit")

        async def add(self, step: int) -> int:
            self.value += step
            return self.value

        def count(self) -> Iterator[int]:
            yield from range(self.value)

    Counter.enter.__isthmus_enter__ = True  # type: ignore[attr-defined]
    Counter.leave.__isthmus_exit__ = True  # type: ignore[attr-defined]
    with Client(address_of[lease], lease) as client:
        counter = client.define(Counter)
        client.call(counter, "__init__", 1)
        assert client.call(counter, "add", 2) == 3
        assert list(client.items(client.start(counter, "count"), 16)) == [0, 1, 2]
    site.wait(lambda: "exit" in site.done(ReadLog, lease=lease, offset=0).text)
    assert site.done(ReadLog, lease=lease, offset=0).text == "enter\nexit\n"


def test_a_native_symbol_that_is_missing_fails_at_each_call(client: Client) -> None:
    function = client.define(
        None, name="native", kind="native", library="/no/such/library.so", symbol="f", result_bytes_max=8
    )
    with pytest.raises(FunctionLoadError, match="/no/such/library"):
        client.call(function)


@pytest.mark.parametrize("domain", ["auto", "sockets"])
def test_a_native_symbol_answers_also_calls_that_came_with_its_definition(
    site: Site, lease: str, library: str, domain: str
) -> None:
    with Client(address_of[lease], lease, domain) as client:
        function = define_twice(client, library)
        for call in range(10**6, 10**6 + 5):
            client.send(Kind.CALL, call, function, b"abc", [])
        answers = [client.frame(call) for call in range(10**6, 10**6 + 5)]
        assert [(frame.kind, bytes(frame.meta)) for frame in answers] == [(Kind.RESULT, b"abcabc")] * 5
        client.send(Kind.CALL, 10**7, function, b"too long", [])
        with pytest.raises(RemoteError, match="error code 7"):
            client.result(10**7)
        for call in range(10**8, 10**8 + 100):
            client.send(Kind.CALL, call, function, b"abc", [])
            assert bytes(client.frame(call).meta) == b"abcabc"
    site.wait(lambda: metered(site, lease) == {"twice": (106, 1)})


def test_a_draining_lease_refuses_calls_as_evicted(client: Client, site: Site, lease: str) -> None:
    function = client.define(lambda: 1)
    assert client.call(function) == 1
    site.done(DrainLease, lease=lease, grace_s=1.0)
    with pytest.raises(EvictedError):
        client.call(function)


def test_a_child_that_a_function_forks_does_not_answer_in_its_place(client: Client) -> None:
    def fork() -> int:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        return os.getpid()

    function = client.define(fork)
    call = client.start(function)
    pid = client.result(call)
    assert client.call(client.define(os.getpid)) == pid


def test_multiprocessing_works_inside_a_function(client: Client) -> None:
    def parallel() -> list[int]:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, [-1, -2])

    assert client.call(client.define(parallel)) == [1, 2]


def test_threads_that_a_function_leaves_behind_live_on(client: Client) -> None:
    def leak() -> None:
        threading.Thread(target=time.sleep, args=(60,)).start()

    client.call(client.define(leak))
    assert client.call(client.define(threading.active_count)) >= 3


def test_numerical_libraries_get_a_thread_per_core_and_start_none_for_one(site: Site) -> None:
    def count() -> tuple[set[int], int]:
        pools = {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
        return pools, len(os.listdir("/proc/self/task")) - threading.active_count()

    for cores in {1, len(os.sched_getaffinity(0))}:
        name = f"ls_{next(lease_numbers)}"
        executor = start_lease(site, name, resources=Resources(cores=cores, memory="512MiB"))
        with Client(executor.address, name) as client:
            pools, others = client.call(client.define(count))
        assert pools == {cores}
        assert others <= cores  # the fabric has a thread of its own
        site.done(EndLease, lease=name, reason=EndReason.RELEASED)
        ended(site, name)


def test_output_of_functions_and_their_children_is_captured(client: Client, site: Site, lease: str) -> None:
    def speak() -> None:
        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.system("echo from a child")

    client.call(client.define(speak))
    log = site.done(ReadLog, lease=lease, offset=0)
    assert log.text == "to stdout\nto stderr\nfrom a child\n"
    assert site.done(ReadLog, lease=lease, offset=log.next_offset).text == ""


def last_report(site: Site, lease: str) -> LeaseReport:
    heartbeats = [report for report in site.reports if isinstance(report, Heartbeat)]
    return next(report for report in heartbeats[-1].leases if report.lease == lease)


def metered(site: Site, lease: str) -> dict[str, tuple[int, int]]:
    """Calls and errors by function, as the last heartbeat told; nothing before the first."""
    try:
        report = last_report(site, lease)
    except (IndexError, StopIteration):
        return {}
    return {use.name: (use.calls, use.errors) for use in report.functions}


def test_calls_are_metered_by_function(client: Client, site: Site, lease: str) -> None:
    good, bad = client.define(lambda: time.sleep(0.01), name="good"), client.define(lambda: 1 / 0, name="bad")
    for _ in range(3):
        client.call(good)
    with pytest.raises(ZeroDivisionError):
        client.call(bad)

    site.wait(lambda: metered(site, lease) == {"good": (3, 0), "bad": (1, 1)})
    assert last_report(site, lease).usage.busy_s >= 0.03
