"""Who may call an executor, and how its clients hear of its end."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import isthmus.fabric
from isthmus.core.errors import (
    HandshakeError,
    TokenError,
)
from isthmus.core.model import EndReason
from isthmus.fabric.frames import CODEC_VERSION, FRAME_VERSION, Kind
from isthmus.node.messages import (
    ExecutorEnded,
)
from tests.live.node.conftest import address_of, lease_numbers
from tests.live.node_peer import (
    Client,
    Site,
    ended,
    hello,
    start_lease,
    token,
)


def _nothing() -> None: ...


def test_two_clients_have_function_tables_of_their_own(client: Client, lease: str) -> None:
    one = client.define(lambda: "first")
    with Client(address_of[lease], lease) as other:
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
            domain.connect(address_of[lease], hello(lease, **{field: value}))
        assert all(version in str(refused.value) for version in both)
    finally:
        domain.close()


@pytest.mark.parametrize("kind", ["forged", "expired", "foreign"])
def test_a_bad_token_is_refused(lease: str, kind: str) -> None:
    tokens = {"forged": "x.y", "expired": token(lease, -1.0), "foreign": token("ls_other")}
    domain = isthmus.fabric.open_domain("sockets")
    try:
        with pytest.raises(TokenError):
            domain.connect(address_of[lease], hello(lease, token=tokens[kind]))
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
    name = f"ls_{next(lease_numbers)}"
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
    name, mark = f"ls_{next(lease_numbers)}", tmp_path / "mark"
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
