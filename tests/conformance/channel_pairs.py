"""Pairs of domains for the channel suite: one in the test process, one in a process of its own.

`ucx-wire` may use nothing but UCX's own TCP, which isthmus leaves off unless UCX_TLS asks for it. A machine
with an RDMA device has one pair more, `ucx-rdma`: both may use nothing but verbs. Its peer listens
at ISTHMUS_TEST_PEER_HOST and is started through the command ISTHMUS_TEST_PEER_COMMAND, so that it can stand
in another network, as if on another machine.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from isthmus.core.errors import FabricError
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric import open_domain
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.frames import Hello, Kind
from tests.conformance.channel_peer import Act, admit

ROOT = Path(__file__).parents[2]
ANSWERS = (Kind.RESULT, Kind.ERROR, Kind.REFUSED)
ONLY = {  # UCX_TLS, and the transport that it must lead to
    "rdma": ("rc_verbs,ud_verbs,self", "rc_verbs"),
    "wire": ("tcp,self", "tcp"),
}
PEER_HOST = os.environ.get("ISTHMUS_TEST_PEER_HOST", "127.0.0.1")
PEER_COMMAND = shlex.split(os.environ.get("ISTHMUS_TEST_PEER_COMMAND", ""))


def _ucx_missing() -> str:
    try:
        open_domain("ucx").close()
    except FabricError as error:
        return str(error)
    return ""


class Pair(NamedTuple):
    """`scheme`: how they shake hands, `unix` or `tcp`; `rdma` and `wire` are TCP, and frames go by ONLY."""

    client: str
    server: str
    scheme: str

    def __str__(self) -> str:
        return f"{self.client}-to-{self.server}-over-{self.scheme}"


UCX_MISSING = _ucx_missing()
_NEEDS_UCX = pytest.mark.skipif(bool(UCX_MISSING), reason=UCX_MISSING or "ucx is here")
DOMAINS = [pytest.param("sockets"), pytest.param("ucx", marks=_NEEDS_UCX)]
PAIRS = [
    pytest.param(Pair("sockets", "sockets", "unix"), id="sockets-unix"),
    pytest.param(Pair("sockets", "sockets", "tcp"), id="sockets-tcp"),
    pytest.param(Pair("ucx", "ucx", "unix"), id="ucx-unix", marks=_NEEDS_UCX),
    pytest.param(Pair("ucx", "ucx", "tcp"), id="ucx-tcp", marks=_NEEDS_UCX),
    pytest.param(Pair("ucx", "ucx", "wire"), id="ucx-wire", marks=_NEEDS_UCX),
    pytest.param(Pair("ucx", "sockets", "unix"), id="ucx-to-sockets", marks=_NEEDS_UCX),
    pytest.param(Pair("sockets", "ucx", "unix"), id="sockets-to-ucx", marks=_NEEDS_UCX),
]
if any(Path("/sys/class/infiniband").glob("*")):
    PAIRS.append(pytest.param(Pair("ucx", "ucx", "rdma"), id="ucx-rdma", marks=_NEEDS_UCX))


def hello(token: str = "token") -> Hello:
    return Hello(token=token, python=python_version(), isthmus=ISTHMUS_VERSION)


class PeerProcess:
    """A `channel_peer` in a process of its own."""

    def __init__(self, domain: str, scheme: str, directory: Path) -> None:
        address = {
            "unix": f"unix:{directory}/{domain}-{time.monotonic_ns()}",
            "tcp": "tcp://127.0.0.1:0",
            "wire": "tcp://127.0.0.1:0",
            "rdma": f"tcp://{PEER_HOST}:0",
        }[scheme]
        command = [sys.executable, "-m", "tests.conformance.channel_peer", domain, address, str(os.getpid())]
        with transports(scheme):
            self.process = subprocess.Popen(
                PEER_COMMAND + command if scheme == "rdma" else command,
                cwd=ROOT, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        self.process.stdout.close()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


class Peers:
    """Peers that survive a test are kept for the next: starting one costs more than most tests."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: dict[tuple[str, str], PeerProcess] = {}

    def kept(self, pair: Pair) -> PeerProcess:
        key = pair.server, pair.scheme
        if key not in self._kept or self._kept[key].process.poll() is not None:
            self._kept[key] = self.fresh(pair)
        return self._kept[key]

    def fresh(self, pair: Pair) -> PeerProcess:
        return PeerProcess(pair.server, pair.scheme, self._directory)

    def stop(self) -> None:
        for peer in self._kept.values():
            peer.stop()


@contextlib.contextmanager
def transports(scheme: str) -> Iterator[None]:
    """What the domains and processes that are started within may use: all there is, or one alone."""
    with pytest.MonkeyPatch.context() as patch:
        if scheme in ONLY:
            patch.setenv("UCX_TLS", ONLY[scheme][0])
        yield


@contextlib.contextmanager
def connected(pair: Pair, peer: PeerProcess) -> Iterator[tuple[Domain, Channel]]:
    with transports(pair.scheme):
        domain = open_domain(pair.client)
    try:
        channel = domain.connect(peer.address, hello())
        assert pair.scheme not in ONLY or ONLY[pair.scheme][1] in channel.transport, channel.transport
        yield domain, channel
    finally:
        domain.close()


@contextlib.contextmanager
def serving(domain_name: str, address: str) -> Iterator[tuple[Domain, str]]:
    """A domain in this process that is polled by a thread and answers nobody."""
    domain = open_domain(domain_name)
    real = domain.listen(address, admit)
    ended = threading.Event()

    def poll() -> None:
        while not ended.is_set():
            domain.poll(1.0)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield domain, real
    finally:
        ended.set()
        domain.wake()
        thread.join()
        domain.close()


def send(
    domain: Domain, channel: Channel, act: Act, call_id: int, meta: bytes = b"", data: tuple[bytes, ...] = ()
) -> None:
    """A CALL that must find room, sooner or later."""
    deadline_s = time.monotonic() + 20
    while not channel.send(Kind.CALL, call_id, act, meta, data):
        assert time.monotonic() < deadline_s, "the channel stayed full for 20 s"
        assert domain.poll(0.01) is None, "an answer came where none was due"


def receive(domain: Domain, count: int, timeout_s: float = 20.0) -> list[Frame]:
    """The next `count` frames; fewer when they do not come in time."""
    frames: list[Frame] = []
    deadline_s = time.monotonic() + timeout_s
    while len(frames) < count and (left_s := deadline_s - time.monotonic()) > 0:
        frame = domain.poll(left_s)
        if frame is not None:
            frames.append(frame)
    return frames


def receive_until_lost(domain: Domain, timeout_s: float = 10.0) -> list[Frame]:
    frames: list[Frame] = []
    deadline_s = time.monotonic() + timeout_s
    while not frames or frames[-1].kind != Kind.LOST:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0, f"no LOST within {timeout_s} s after {len(frames)} frames"
        frame = domain.poll(left_s)
        if frame is not None:
            frames.append(frame)
    return frames


def ask(
    domain: Domain,
    channel: Channel,
    act: Act,
    meta: bytes = b"",
    data: tuple[bytes, ...] = (),
    call_id: int = 1,
) -> Frame:
    """One call and its answer."""
    frame = channel.call(call_id, act, meta, data, 0, 0.0, 30.0)
    assert frame is not None, f"no answer to {act.name} within 30 s"
    return frame


def descriptor_count() -> int:
    return len(os.listdir("/proc/self/fd"))
