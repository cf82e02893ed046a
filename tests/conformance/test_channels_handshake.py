"""Strangers, liars and the slow at the door: refused with words or cut off, and nobody else notices."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from isthmus.core.errors import FabricError, HandshakeError, PeerLostError, TokenError
from isthmus.core.model import python_version
from isthmus.fabric import bootstrap, open_domain
from isthmus.fabric.channels import Domain
from isthmus.fabric.frames import (
    FRAME_VERSION,
    HEADER_BYTES,
    Header,
    Hello,
    Kind,
    pack_handshake,
    pack_header,
)
from tests.conformance.channel_pairs import (
    DOMAINS,
    Pair,
    PeerProcess,
    Peers,
    ask,
    connected,
    hello,
    receive,
    serving,
)
from tests.conformance.channel_peer import Act

HELLO = pack_handshake(hello())


@pytest.fixture(params=DOMAINS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Address of a domain of each kind."""
    with serving(request.param, f"unix:{tmp_path}/s") as (_, address):
        yield address


@pytest.fixture(params=DOMAINS)
def client(request: pytest.FixtureRequest) -> Iterator[Domain]:
    domain = open_domain(request.param)
    yield domain
    domain.close()


@pytest.fixture(params=DOMAINS)
def peer(request: pytest.FixtureRequest, peers: Peers) -> tuple[Pair, PeerProcess]:
    pair = Pair("sockets", request.param, "unix")
    return pair, peers.kept(pair)


def refused(client: Domain, server: str, kind: type[Exception], words: str, **changes: object) -> None:
    with pytest.raises(kind, match=words) as caught:
        client.connect(server, msgspec.structs.replace(hello(), **changes), 3.0)
    assert type(caught.value) is kind


# refusals ---------------------------------------------------------------------------------------------------
def test_a_bad_token_is_refused_in_the_peers_words(client: Domain, server: str) -> None:
    refused(client, server, TokenError, "expired 3.0 s ago", token="refuse")


def test_another_refusal_is_a_handshake_error_with_its_code(client: Domain, server: str) -> None:
    refused(client, server, HandshakeError, "LeaseEndedError: draining", token="drain")


def test_another_python_is_refused_naming_both_versions(client: Domain, server: str) -> None:
    refused(client, server, HandshakeError, f"cpython-2.7.*{python_version()}", python="cpython-2.7")


def test_another_frame_version_is_refused_naming_both(client: Domain, server: str) -> None:
    refused(client, server, HandshakeError, f"has 99, the executor has {FRAME_VERSION}", frame_version=99)


def test_another_codec_version_is_refused(client: Domain, server: str) -> None:
    refused(client, server, HandshakeError, "codec version differs", codec_version=99)


def test_a_refused_client_may_try_again(client: Domain, server: str) -> None:
    refused(client, server, TokenError, "expired", token="refuse")
    channel = client.connect(server, hello())
    assert channel.alive
    assert channel.peer.executor == "ex_test"  # type: ignore[union-attr]
    channel.close()


# the calling side meets strangers ---------------------------------------------------------------------------
def open_listener() -> tuple[socket.socket, str]:
    """One that is not isthmus, and its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = listener.getsockname()
    return listener, f"tcp://{host}:{port}"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", HandshakeError),
        (struct.pack("<I", 5) + b"\xc1\xc1\xc1\xc1\xc1", HandshakeError),
        (struct.pack("<I", 2**31), HandshakeError),
        (pack_handshake(hello()), HandshakeError),
        (b"\x05", PeerLostError),
        (b"", PeerLostError),
    ],
)
def test_a_listener_that_is_not_isthmus_is_named_so(
    client: Domain, data: bytes, kind: type[Exception]
) -> None:
    listener, address = open_listener()

    def serve() -> None:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):  # the caller may have hung up at any point
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(kind):
        client.connect(address, hello(), 3.0)
    thread.join()
    listener.close()


def test_a_listener_that_never_answers_costs_the_timeout_and_no_more(client: Domain) -> None:
    listener, address = open_listener()
    began_s = time.monotonic()
    with pytest.raises(PeerLostError, match=r"0.2 s"):
        client.connect(address, hello(), 0.2)
    assert time.monotonic() - began_s < 1.5
    listener.close()


@pytest.mark.parametrize("address", ["unix:/no/such/socket", "tcp://127.0.0.1:1"])
def test_nobody_there_is_a_lost_peer(client: Domain, address: str) -> None:
    with pytest.raises(PeerLostError, match="nobody answers"):
        client.connect(address, hello(), 1.0)


@pytest.mark.parametrize(
    "address", ["", "unix:", "tcp://", "tcp://host", "tcp://h:99999", "http://h:1", "tcp://[::1"]
)
def test_what_is_no_address_is_refused_with_the_accepted_forms(client: Domain, address: str) -> None:
    with pytest.raises(FabricError, match="tcp://HOST:PORT"):
        client.connect(address, hello())
    with pytest.raises(FabricError):
        client.listen(address, lambda _: pytest.fail("nobody can call"))


def test_a_taken_address_is_refused_and_a_dead_one_reused(client: Domain, tmp_path: Path) -> None:
    address = client.listen(f"unix:{tmp_path}/s", lambda _: pytest.fail("nobody calls"))
    second = open_domain("sockets")
    with pytest.raises(FabricError, match="cannot listen"):
        second.listen(address, lambda _: pytest.fail("nobody calls"))
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(f"{tmp_path}/stale")
    stale.close()
    assert second.listen(f"unix:{tmp_path}/stale", lambda _: pytest.fail("nobody calls"))
    second.close()
    assert not (tmp_path / "stale").exists()


# the listening side meets strangers -------------------------------------------------------------------------
def raw(address: str) -> socket.socket:
    sock = bootstrap.dial(address, 2.0)
    sock.settimeout(5.0)
    return sock


def is_cut_off(sock: socket.socket) -> bool:
    """True when the other side closes; raises TimeoutError when it does not."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<I", 0),
        struct.pack("<I", 65537),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 1) + b"\x80",
        pack_handshake(msgspec.structs.replace(hello()))[:-1] + b"\xff" * 3,
        struct.pack("<I", 60_000) + b"\x82\xa1x" + b"\x91" * 59_997,
        pack_handshake(msgspec.structs.replace(hello(), channel_id=2**32)),
        pack_handshake(msgspec.structs.replace(hello(), channel_key=-1)),
    ],
    ids=["http", "empty", "too-long", "no-msgpack", "no-struct", "broken", "nested", "big-id", "bad-key"],
)
def test_garbage_is_cut_off_and_honest_callers_are_served(server: str, data: bytes) -> None:
    stranger = raw(server)
    stranger.sendall(data)
    domain = open_domain("sockets")
    assert domain.connect(server, hello()).alive
    assert is_cut_off(stranger)
    stranger.close()
    domain.close()


def test_the_slow_and_the_silent_are_cut_off_in_time(server: str) -> None:
    began_s = time.monotonic()
    strangers = [raw(server) for _ in range(5)]
    for number, stranger in enumerate(strangers):
        stranger.sendall(HELLO[: number * 7])
    domain = open_domain("sockets")
    assert domain.connect(server, hello()).alive
    assert all(is_cut_off(stranger) for stranger in strangers)
    assert time.monotonic() - began_s < bootstrap.HANDSHAKE_S + 2.0
    for stranger in strangers:
        stranger.close()
    domain.close()


def test_a_hello_in_single_bytes_is_understood(server: str) -> None:
    sock = raw(server)
    for byte in HELLO:
        sock.sendall(bytes([byte]))
    assert sock.recv(4)
    sock.close()


def test_a_flood_of_callers_does_not_starve_an_honest_one(server: str) -> None:
    strangers = [raw(server) for _ in range(bootstrap.CALLERS_MAX + 50)]
    domain = open_domain("sockets")
    assert domain.connect(server, hello(), 10.0).alive
    for stranger in strangers:
        stranger.close()
    domain.close()


def listening() -> set[str]:
    """TCP sockets of this process at which anybody may call, and memory that its group may attach."""
    links = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_socket(name)}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{table}").read_text("ascii").splitlines()[1:]
    ]
    segments = [line for line in Path("/proc/self/maps").read_text().splitlines() if "SYSV" in line]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links} | set(segments)


def _is_socket(descriptor: str) -> bool:
    with contextlib.suppress(OSError):  # the descriptor that listed them
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    return False


@pytest.mark.parametrize("kind", DOMAINS)
def test_a_domain_has_no_door_but_the_one_it_was_told_to_open(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    before = listening()
    domain = open_domain(kind)
    domain.listen(f"unix:{tmp_path}/s", lambda _: pytest.fail("nobody calls"))
    assert listening() - before == set()
    domain.listen("tcp://127.0.0.1:0", lambda _: pytest.fail("nobody calls"))
    assert len(listening() - before) == 1
    domain.close()


@pytest.mark.parametrize("kind", DOMAINS)
def test_a_peer_of_another_machine_without_rdma_is_reached_by_sockets(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    peer = PeerProcess(kind, "tcp", tmp_path)
    monkeypatch.setattr(bootstrap, "host_identity", lambda: "another machine")
    try:
        with connected(Pair(kind, kind, "tcp"), peer) as (domain, channel):
            assert channel.transport == "sockets:tcp"
            assert ask(domain, channel, Act.ECHO, b"far").meta == b"far"
    finally:
        peer.stop()


# admitted, and then no frames -------------------------------------------------------------------------------
def admitted(address: str) -> tuple[socket.socket, Header]:
    """A socket whose handshake is over, and the header of a good frame."""
    sock = bootstrap.dial(address, 2.0)
    welcome = bootstrap.greet(sock, msgspec.structs.replace(hello(), channel_id=5, channel_key=6), 2.0)
    sock.settimeout(5.0)
    return sock, Header(Kind.CALL, 0, welcome.channel_id, welcome.channel_key, 1, 0, Act.ECHO, 0, 0, 0)


@pytest.mark.parametrize(
    "data",
    [
        bytes(HEADER_BYTES),
        b"\xff" * 1000,
        pack_header(Header(Kind.LOST, 0, 1, 1, 1, 0, 0, 0, 0, 0)),
        pack_header(Header(Kind.CALL, 0, 1, 1, 1, 0, 0, 0, 2**40, 0)),
        pack_header(Header(Kind.CALL, 0, 1, 1, 1, 0, 0, 0, 0, 2**60)),
        pack_header(Header(Kind.CALL, 4, 1, 1, 1, 0, 0, 0, 0, 4096)),
    ],
    ids=["zeros", "ones", "lost", "huge-meta", "huge-data", "shared-without-descriptor"],
)
def test_a_peer_that_speaks_no_frames_loses_its_channel_only(
    peer: tuple[Pair, PeerProcess], data: bytes
) -> None:
    pair, process = peer
    with connected(pair, process) as (domain, channel):
        before = int(ask(domain, channel, Act.MALFORMED).meta)
        liar, _ = admitted(process.address)
        liar.sendall(data)
        assert is_cut_off(liar)
        liar.close()
        assert ask(domain, channel, Act.ECHO, b"well").meta == b"well"
        if pair.server == "sockets":
            assert int(ask(domain, channel, Act.MALFORMED).meta) == before + 1


def test_a_frame_with_a_foreign_key_is_dropped(peer: tuple[Pair, PeerProcess]) -> None:
    _, process = peer
    sock, good = admitted(process.address)
    sock.sendall(pack_header(good._replace(channel_key=good.channel_key ^ 1)))
    sock.sendall(pack_header(good._replace(call_id=77)))
    reply = sock.recv(HEADER_BYTES, socket.MSG_WAITALL)
    assert struct.unpack_from("<Q", reply, 16) == (77,)
    sock.close()


def test_a_frame_in_single_bytes_is_understood(peer: tuple[Pair, PeerProcess]) -> None:
    _, process = peer
    sock, good = admitted(process.address)
    for byte in pack_header(good._replace(meta_bytes=3, data_bytes=4)) + b"abcwxyz":
        sock.sendall(bytes([byte]))
    reply = sock.recv(HEADER_BYTES + 7, socket.MSG_WAITALL)
    assert reply[HEADER_BYTES:] == b"abcwxyz"
    sock.close()


def test_descriptors_that_no_frame_claims_are_closed(peer: tuple[Pair, PeerProcess]) -> None:
    pair, process = peer
    with connected(pair, process) as (domain, channel):
        before = int(ask(domain, channel, Act.DESCRIPTORS).meta)
        sock, good = admitted(process.address)
        socket.send_fds(sock, [pack_header(good)], [0, 1, 2])
        sock.recv(HEADER_BYTES, socket.MSG_WAITALL)
        sock.close()
        deadline_s = time.monotonic() + 5
        while int(ask(domain, channel, Act.DESCRIPTORS).meta) > before:
            assert time.monotonic() < deadline_s, "the peer keeps descriptors it was sent"
            receive(domain, 1, 0.01)


def test_unsealed_memory_is_not_mapped(peer: tuple[Pair, PeerProcess]) -> None:
    _, process = peer
    sock = bootstrap.dial(process.address, 2.0)
    greeting: Hello = msgspec.structs.replace(
        hello(), channel_id=5, channel_key=6, host=bootstrap.host_identity()
    )
    welcome = bootstrap.greet(sock, greeting, 2.0)
    memory = os.memfd_create("unsealed")
    os.ftruncate(memory, 2**20)
    header = Header(Kind.CALL, 4, welcome.channel_id, welcome.channel_key, 1, 0, Act.ECHO, 0, 0, 2**20)
    socket.send_fds(sock, [pack_header(header)], [memory])
    sock.settimeout(5.0)
    assert is_cut_off(sock)
    os.close(memory)
    sock.close()
