"""What an executor does with calls of every kind, and with functions that misbehave."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # type: ignore[import-untyped]

import isthmus.fabric
from isthmus.core.errors import (
    CallCancelledError,
    CallTimeoutError,
    CodecError,
    EvictedError,
    FunctionLoadError,
    HandshakeError,
    PeerLostError,
    RemoteError,
    TokenError,
)
from isthmus.core.model import EndReason, Resources
from isthmus.fabric.codec import FunctionHeader, GroupTable, encode_group, encode_header
from isthmus.fabric.frames import CODEC_VERSION, FRAME_VERSION, Kind
from isthmus.node.messages import (
    AddExecutor,
    DrainLease,
    EndLease,
    ExecutorEnded,
    Heartbeat,
    LeaseReport,
    ReadLog,
)
from tests.live.node_peer import (
    Client,
    Site,
    ended,
    hello,
    running_node,
    start_lease,
    token,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_node(tmp_path_factory.mktemp("node")) as (site, _):
        yield site


_numbers = iter(range(10**6))


@pytest.fixture
def lease(site: Site) -> Iterator[str]:
    name = f"ls_{next(_numbers)}"
    start_lease_address[name] = start_lease(site, name).address
    yield name
    site.done(EndLease, lease=name, reason=EndReason.RELEASED)
    ended(site, name)


start_lease_address: dict[str, str] = {}


@pytest.fixture
def client(lease: str) -> Iterator[Client]:
    with Client(start_lease_address[lease], lease) as client:
        yield client


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
    with Client(start_lease_address[lease], lease) as client:
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


TWICE = """
#include <stdint.h>
#include <string.h>
int32_t twice(const void *in, uint64_t in_bytes, void *out, uint64_t *out_bytes) {
    if (2 * in_bytes > *out_bytes) return 7;
    memcpy(out, in, in_bytes);
    memcpy((char *)out + in_bytes, in, in_bytes);
    *out_bytes = 2 * in_bytes;
    return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("library")
    (directory / "twice.c").write_text(TWICE)
    target = str(directory / "twice.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, directory / "twice.c"], check=True)
    return target


def define_twice(client: Client, library: str) -> int:
    return client.define(
        None, name="twice", kind="native", library=library, symbol="twice", result_bytes_max=8
    )


@pytest.mark.parametrize("domain", ["auto", "sockets"])
def test_a_native_symbol_answers_also_calls_that_came_with_its_definition(
    site: Site, lease: str, library: str, domain: str
) -> None:
    with Client(start_lease_address[lease], lease, domain) as client:
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


def _nothing() -> None: ...


def _sleep() -> None:
    time.sleep(60)


def _spin() -> None:
    while True:
        pass


async def _await() -> None:
    await asyncio.sleep(60)


def _block_in_c() -> None:
    threading.Event().wait(60)


@pytest.mark.parametrize(
    "function", [_sleep, _spin, _await, _block_in_c], ids=lambda f: f.__name__.strip("_")
)
@pytest.mark.parametrize(
    ("reason", "error"), [(b"cancel", CallCancelledError), (b"timeout", CallTimeoutError)]
)
def test_a_running_call_is_interrupted(client: Client, function: object, reason: bytes, error: type) -> None:
    client.call(client.define(_nothing))  # imports this module there: imports may swallow an interruption
    call = client.start(client.define(function))
    after = client.start(client.define(lambda: "next"))
    _await_running(client)
    started_s = time.monotonic()
    client.cancel(call, reason)
    with pytest.raises(error):
        client.result(call)
    assert time.monotonic() - started_s < 2
    assert client.result(after) == "next"


@pytest.mark.parametrize("domain", ["auto", "sockets"])
def test_a_call_stays_interruptible_when_a_native_call_is_served_meanwhile(
    lease: str, library: str, domain: str
) -> None:
    with Client(start_lease_address[lease], lease, domain) as client:
        client.call(client.define(_nothing))  # imports this module there
        twice = define_twice(client, library)
        call = client.start(client.define(_spin))
        _await_running(client)
        client.send(Kind.CALL, 10**6, twice, b"abc", [])
        client.cancel(10**7)  # of no call; but what is urgent has the executor read all that came
        assert bytes(client.frame(10**6).meta) == b"abcabc"
        client.cancel(call)
        with pytest.raises(CallCancelledError, match="while it ran"):
            client.result(call, 5.0)


def _await_running(client: Client) -> None:
    """The frames are out; the executor needs a moment more to begin."""
    client.domain.poll(0.1)


def test_a_queued_call_is_cancelled_without_running(client: Client, site: Site, lease: str) -> None:
    slow = client.define(lambda: time.sleep(0.5))
    loud = client.define(lambda: print("ran"))
    first, queued = client.start(slow), client.start(loud)
    client.cancel(queued)
    with pytest.raises(CallCancelledError):
        client.result(queued)
    client.result(first)
    assert site.done(ReadLog, lease=lease, offset=0).text == ""


def test_a_call_whose_time_is_up_before_it_runs_is_not_run(client: Client, site: Site, lease: str) -> None:
    slow, loud = client.define(lambda: time.sleep(1)), client.define(lambda: print("ran"))
    first = client.start(slow)
    _await_running(client)
    late = client.start(loud, deadline_ns=10**8)
    client.cancel(late + 1)  # of no call; but what is urgent has the executor read all that came
    with pytest.raises(CallTimeoutError):
        client.result(late)
    client.result(first)
    assert site.done(ReadLog, lease=lease, offset=0).text == ""


def test_finally_blocks_run_when_a_call_is_cancelled(client: Client, site: Site, lease: str) -> None:
    def careful() -> None:
        with contextlib.suppress(Exception):
            try:
                time.sleep(60)
            finally:
                print("cleaned up")

    call = client.start(client.define(careful))
    _await_running(client)
    client.cancel(call)
    with pytest.raises(CallCancelledError):
        client.result(call)
    assert site.done(ReadLog, lease=lease, offset=0).text == "cleaned up\n"


def test_a_client_that_goes_away_frees_the_executor(lease: str) -> None:
    with Client(start_lease_address[lease], lease) as first:
        first.start(first.define(_sleep))
        _await_running(first)
    with Client(start_lease_address[lease], lease) as second:
        assert second.result(second.start(second.define(lambda: 2)), timeout_s=5) == 2


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


def _join(clients: list[Client], addresses: list[str], lease: str, function: Any) -> list[int]:
    """Start a call of a group's function on each member; their ids."""
    peers = tuple((address, token(lease)) for address in addresses)
    calls = []
    for rank, client in enumerate(clients):
        table = GroupTable(group=f"gr_{lease}", rank=rank, peers=peers)
        client.call(client.define(os.getpid))  # the way is paved: what follows leaves at once, without a poll
        header = encode_header(FunctionHeader(name="group", kind="group"))
        client.send(Kind.DEFINE, 0, 500, header, [encode_group(table)])
        calls.append(client.start(client.define(function, group=500)))
    return calls


def test_members_of_a_group_reach_each_other(site: Site, lease: str) -> None:
    more = site.done(AddExecutor, lease=lease).executor
    assert more is not None
    addresses = [start_lease_address[lease], more.address]

    def share(group: Any) -> tuple[int, float]:
        total = group.allreduce(np.full(100_000, float(group.rank + 1)))
        group.barrier()
        return group.rank, float(total.sum())

    with Client(addresses[0], lease) as first, Client(addresses[1], lease) as second:
        calls = _join([first, second], addresses, lease, share)
        assert first.result(calls[0]) == (0, 300_000.0)
        assert second.result(calls[1]) == (1, 300_000.0)


def test_a_member_whose_partner_cannot_be_reached_fails(lease: str) -> None:
    address = start_lease_address[lease]
    with Client(address, lease) as client:
        (call,) = _join([client], [address, "unix:/nobody"], lease, lambda group: group.recv(1))
        with pytest.raises(PeerLostError):
            client.result(call)


def test_a_member_waiting_for_one_that_never_comes_is_cancelled(site: Site, lease: str) -> None:
    more = site.done(AddExecutor, lease=lease).executor
    assert more is not None
    addresses = [start_lease_address[lease], more.address]
    with Client(addresses[0], lease) as client:
        (call,) = _join([client], addresses, lease, lambda group: group.recv(1))
        _await_running(client)
        client.cancel(call)
        with pytest.raises(CallCancelledError):
            client.result(call, timeout_s=5)


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
        name = f"ls_{next(_numbers)}"
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


def test_two_clients_have_function_tables_of_their_own(client: Client, lease: str) -> None:
    one = client.define(lambda: "first")
    with Client(start_lease_address[lease], lease) as other:
        two = other.define(lambda: "second")
        assert one == two
        assert (client.call(one), other.call(two)) == ("first", "second")


@pytest.mark.parametrize(
    ("field", "value", "both"),
    [
        ("python", "cpython-2.7", ("cpython-2.7", "cpython-3")),
        ("codec_version", 99, ("99", str(CODEC_VERSION))),
        ("frame_version", 98, ("98", str(FRAME_VERSION))),
    ],
)
def test_a_client_of_another_version_is_told_both(
    lease: str, field: str, value: object, both: tuple[str, str]
) -> None:
    domain = isthmus.fabric.open_domain("sockets")
    try:
        with pytest.raises(HandshakeError) as refused:
            domain.connect(start_lease_address[lease], hello(lease, **{field: value}))
        assert all(version in str(refused.value) for version in both)
    finally:
        domain.close()


@pytest.mark.parametrize("kind", ["forged", "expired", "foreign"])
def test_a_bad_token_is_refused(lease: str, kind: str) -> None:
    tokens = {"forged": "x.y", "expired": token(lease, -1.0), "foreign": token("ls_other")}
    domain = isthmus.fabric.open_domain("sockets")
    try:
        with pytest.raises(TokenError):
            domain.connect(start_lease_address[lease], hello(lease, token=tokens[kind]))
    finally:
        domain.close()


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        (lambda: sys.exit(3), "exit code 3"),
        (lambda: os._exit(4), "exit code 4"),
        (lambda: os.kill(os.getpid(), 11), "signal SIGSEGV"),
        (lambda: os.abort(), "signal SIGABRT"),
    ],
    ids=["sys.exit", "os._exit", "segfault", "abort"],
)
def test_a_function_that_ends_its_process_ends_the_lease_with_the_reason(
    site: Site, function: object, detail: str
) -> None:
    name = f"ls_{next(_numbers)}"
    with Client(start_lease(site, name).address, name) as client:
        call = client.start(client.define(function))
        assert client.frame(call, 5).kind == Kind.LOST
    died = site.wait_report(ExecutorEnded, lease=name)
    assert (died.reason, died.detail) == (EndReason.EXITED, detail)
    assert ended(site, name).reason == EndReason.EXITED


@pytest.mark.parametrize("domain", ["auto", "sockets"])
def test_a_call_that_kills_the_executor_begins_when_the_answers_before_it_have_left(
    site: Site, tmp_path: Path, domain: str
) -> None:
    """Its client knows which calls had ended and need not run again. Other clients do not wait with it."""
    name, mark = f"ls_{next(_numbers)}", tmp_path / "mark"
    address = start_lease(site, name).address
    items, words = (400, b"i" * 100) if domain == "auto" else (1000, b"i" * 2000)

    def many() -> Iterator[bytes]:
        for _ in range(items):
            yield words

    def die() -> None:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with Client(address, name, domain) as client, Client(address, name, domain) as other:
        assert other.call(other.define(_nothing)) is None
        answered = client.start(client.define(many), credits=2 * items)
        killed = client.start(client.define(die))
        assert [other.call(other.define(_nothing)) for _ in range(3)] == [None] * 3
        assert not mark.exists(), "nothing was unsent, or the call did not wait"
        frames = [client.frame(answered) for _ in range(items + 1)]
        assert [frame.kind for frame in frames] == [Kind.YIELD] * items + [Kind.RESULT]
        assert client.frame(killed).kind == Kind.LOST
        assert mark.exists()
    assert ended(site, name).reason == EndReason.KILLED
