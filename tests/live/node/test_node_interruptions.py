"""Calls that are cancelled, late, or nobody's any more: stopped soon, wherever they are."""

import asyncio
import contextlib
import threading
import time

import pytest

from isthmus.core.errors import (
    CallCancelledError,
    CallTimeoutError,
)
from isthmus.fabric.frames import Kind
from isthmus.node.messages import (
    ReadLog,
)
from tests.live.node.conftest import address_of, await_running, define_twice
from tests.live.node_peer import (
    Client,
    Site,
)


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
    await_running(client)
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
    with Client(address_of[lease], lease, domain) as client:
        client.call(client.define(_nothing))  # imports this module there
        twice = define_twice(client, library)
        call = client.start(client.define(_spin))
        await_running(client)
        client.send(Kind.CALL, 10**6, twice, b"abc", [])
        client.cancel(10**7)  # of no call; but what is urgent has the executor read all that came
        assert bytes(client.frame(10**6).meta) == b"abcabc"
        client.cancel(call)
        with pytest.raises(CallCancelledError, match="while it ran"):
            client.result(call, 5.0)


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
    await_running(client)
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
    await_running(client)
    client.cancel(call)
    with pytest.raises(CallCancelledError):
        client.result(call)
    assert site.done(ReadLog, lease=lease, offset=0).text == "cleaned up\n"


def test_a_client_that_goes_away_frees_the_executor(lease: str) -> None:
    with Client(address_of[lease], lease) as first:
        first.start(first.define(_sleep))
        await_running(first)
    with Client(address_of[lease], lease) as second:
        assert second.result(second.start(second.define(lambda: 2)), timeout_s=5) == 2
