"""Strangers at every door: their bytes, silence and tokens change nothing for those who belong."""

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import isthmus
from isthmus.core import tokens
from isthmus.core.api import Grant
from isthmus.core.ids import LeaseId
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric import open_domain
from isthmus.fabric.frames import Hello
from tests.faults import census, doors

SEED = 20240612
STRANGERS = 40
CLOSED_S = 15.0


def add(left: int, right: int) -> int:
    return left + right


def junk() -> list[bytes]:
    """What a stranger may say first: noise, other protocols, announcements of impossible sizes, nothing."""
    noise = random.Random(SEED)
    said = [noise.randbytes(noise.randint(1, 5000)) for _ in range(STRANGERS)]
    said += [
        b"",
        b"\0" * 4096,
        b"\xff" * 4096,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        (2**31).to_bytes(4, "little") + b"x" * 100,
        (60000).to_bytes(4, "little") + b"\x81",
        (5).to_bytes(4, "little") + b"\xdd\xff\xff\xff\xff",
        (60000).to_bytes(4, "little") + b"\x82\xa1x" + b"\x91" * 59997,
    ]
    return said


@pytest.fixture
def grant(site: isthmus.Site) -> Iterator[Grant]:
    door = doors.find()
    granted = door.lease()
    yield granted
    door.release(granted)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side hangs up, whatever it says before."""
    with contextlib.suppress(ConnectionError):
        while connection.recv(65536):
            continue
    return True


def test_junk_at_an_executor_is_hung_up_on_and_harms_no_call(site: isthmus.Site) -> None:
    address = site.leases()[0].executors[0].address
    executor = site.call(os.getpid)
    for said in junk():
        with doors.dial(address, CLOSED_S) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
            assert is_closed(connection)
    assert site.call(os.getpid) == executor


def test_silent_strangers_do_not_keep_clients_out(site: isthmus.Site) -> None:
    address = site.leases()[0].executors[0].address
    executor = site.call(os.getpid)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(doors.dial(address))
        assert site.call(os.getpid) == executor
        with isthmus.connect() as other:
            assert other.submit(add, 1, 2).result(timeout_s=CLOSED_S) == 3


def test_junk_at_the_site_harms_no_request(site: isthmus.Site) -> None:
    door = doors.find()
    for said in junk():
        with doors.dial(door.url, CLOSED_S) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
            assert is_closed(connection)
    assert site.leases()


UPGRADE = (
    b"GET /agent HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


NOT_AN_AGENT = (b"\x82\x85abcd\x00\x01\x02\x03\x04", b"\x82\xfe\xff\xffabcd" + b"x" * 65535, b"junk" * 100)


def test_a_stranger_cannot_be_an_agent(site: isthmus.Site) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(doors.dial(doors.find().url, CLOSED_S)) for _ in NOT_AN_AGENT]
        for connection, said in zip(connections, NOT_AN_AGENT, strict=True):
            connection.sendall(UPGRADE + said)
        assert site.call(add, 1, 2) == 3
        assert site.leases()
        assert all(is_closed(connection) for connection in connections)


def test_the_site_answers_nobody_without_a_key(site: isthmus.Site) -> None:
    door = doors.find()
    with door.client() as client:
        for bearer in ("", "Bearer", "Bearer wrong", "Bearer lease:ls_x:y", "Basic Zm9vOmJhcg=="):
            for path in ("/v1/leases", "/v1/status", "/v1/nodes", "/v1/usage", "/v1/keys"):
                reply = client.get(path, headers={"Authorization": bearer})
                assert reply.status_code in (401, 403), (bearer, path)
                assert reply.json()["error"]["code"] in ("AuthError", "TokenError")


def say_hello(address: str, token: str) -> None:
    domain = open_domain("auto")
    try:
        hello = Hello(token=token, python=python_version(), isthmus=ISTHMUS_VERSION)
        domain.connect(address, hello).close()
    finally:
        domain.close()


def test_the_right_token_is_let_in(grant: Grant) -> None:
    say_hello(grant.executors[0].address, grant.token)


def test_wrong_tokens_are_refused(site: isthmus.Site, grant: Grant) -> None:
    address = grant.executors[0].address
    middle = len(grant.token) // 2
    flipped = grant.token[:middle] + ("A" if grant.token[middle] != "A" else "B") + grant.token[middle + 1 :]
    for forged in (flipped, "", "x", grant.token + "x", grant.token[:20], "\0" * 64, "💥" * 50):
        with pytest.raises(isthmus.TokenError):
            say_hello(address, forged)


def test_a_token_of_another_lease_is_refused(site: isthmus.Site, grant: Grant) -> None:
    (mine,) = site.leases()
    assert mine.lease != grant.lease
    with pytest.raises(isthmus.TokenError):
        say_hello(mine.executors[0].address, grant.token)


def test_an_expired_token_is_refused(grant: Grant) -> None:
    site_key = bytes.fromhex((doors.find().state / "site.key").read_text())
    claims = tokens.verify(grant.token, tokens.lease_key(site_key, grant.lease), grant.lease, now_s=0.0)
    key = tokens.lease_key(site_key, LeaseId(grant.lease))
    old = tokens.sign(msgspec.structs.replace(claims, expires_s=1.0), key)
    with pytest.raises(isthmus.TokenError, match="expired"):
        say_hello(grant.executors[0].address, old)


def test_another_python_is_told_both_versions(grant: Grant) -> None:
    domain = open_domain("auto")
    hello = Hello(token=grant.token, python="cpython-2.7", isthmus=ISTHMUS_VERSION)
    try:
        with pytest.raises(isthmus.HandshakeError, match="cpython-2.7.*" + python_version()):
            domain.connect(grant.executors[0].address, hello)
    finally:
        domain.close()


def test_no_process_has_a_port_but_the_site(site: isthmus.Site) -> None:
    """Neither executors, nor the agent, nor the client that calls: UCX would open some in each."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    ports = {f"socket:[{row[9]}]": int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
    found = set()
    for pid in (os.getpid(), *(process.pid for process in census.descendants())):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found |= {ports.get(os.readlink(link)) for link in Path(f"/proc/{pid}/fd").iterdir()}
    assert found - {None} == {doors.find().port}


def test_secrets_are_readable_by_their_user_only(site: isthmus.Site) -> None:
    state = doors.find().state
    assert state.stat().st_mode & 0o077 == 0
    for path in state.rglob("*"):
        if path.is_file() and ("key" in path.name and path.suffix != ".sqlite3"):
            assert path.stat().st_mode & 0o077 == 0, path


def test_no_secret_is_in_a_process_list_or_log(site: isthmus.Site, grant: Grant) -> None:
    door = doors.find()
    secrets = [door.key, grant.token, (door.state / "site.key").read_bytes().hex()]
    commands = " ".join(process.command for process in census.descendants())
    logs = " ".join(
        path.read_text(errors="replace") for path in Path(door.state, "logs").rglob("*") if path.is_file()
    )
    for secret in secrets:
        assert secret not in commands
        assert secret not in logs
