"""How a channel begins: addresses, the listening socket, and the handshake.

The protocol is a pure state machine (`Receiving`, `step`, `settle`, `judge`): bytes in, a message or an error
out. The shell around it is thin and never blocks on a stranger: `Reception` owns the listening socket and the
callers whose Hello has not arrived in full, each with a deadline and a byte limit; `greet` is the other side.

Invariant: exactly the bytes of the handshake are read from the socket, so that the next byte (and any file
descriptor that rides on it) belongs to the channel. Not here: frames after the handshake (`streams.py`).
"""

import contextlib
import errno
import functools
import os
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from isthmus.core.errors import (
    FabricError,
    FrameError,
    HandshakeError,
    IsthmusError,
    PeerLostError,
    TokenError,
)
from isthmus.core.model import python_version
from isthmus.fabric.channels import Admission
from isthmus.fabric.frames import (
    CODEC_VERSION,
    FRAME_VERSION,
    Handshake,
    Hello,
    Refusal,
    Welcome,
    handshake_bytes,
    pack_handshake,
    unpack_handshake,
)

HANDSHAKE_S = 2.0  # a caller that has not said Hello by then is cut off: a live one needs about a millisecond
CALLERS_MAX = (
    512  # unfinished handshakes at once; beyond it the oldest is cut off, so that a flood cannot starve us
)
BACKLOG = 1024
_ACCEPTS_MAX = 64  # per `arrivals`, so that a flood of callers does not hold up the channels that exist
_DIAL_RETRY_S = 0.002

SocketAddress = str | tuple[str, int]


@functools.cache
def host_identity() -> str:
    """Equal in two processes only if they share a kernel and its network, so that shared memory can work."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot_id}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return f"{socket.gethostname()}/unknown"


# addresses --------------------------------------------------------------------------------------------------
def parse_address(address: str) -> tuple[socket.AddressFamily, SocketAddress]:
    """`unix:PATH` or `tcp://HOST:PORT`. Raises FabricError with the accepted forms."""
    if address.startswith("unix:") and len(address) > len("unix:"):
        return socket.AF_UNIX, address.removeprefix("unix:")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise FabricError(
            f"not a fabric address: {address!r} ({error}); write unix:PATH or tcp://HOST:PORT"
        ) from error
    if parts.scheme != "tcp" or host is None or port is None:
        raise FabricError(f"not a fabric address: {address!r}; write unix:PATH or tcp://HOST:PORT")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, port)


def format_address(sock: socket.socket) -> str:
    """The address at which `sock` listens."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"tcp://[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"tcp://{name[0]}:{name[1]}"


def tune(sock: socket.socket) -> None:
    """Non-blocking; on TCP no Nagle delay, and a peer host that vanished is noticed within about 6 s."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 6000)


# the protocol, pure -----------------------------------------------------------------------------------------
class Receiving(NamedTuple):
    """A message of which `received` has arrived so far; body_bytes is None until its length is known."""

    received: bytes = b""
    body_bytes: int | None = None

    @property
    def needed_bytes(self) -> int:
        """Read at most this much, then `step`."""
        return (4 if self.body_bytes is None else self.body_bytes) - len(self.received)


def step(state: Receiving, data: bytes) -> Receiving | Handshake:
    """The state after `data` (at most `needed_bytes`), or the whole message. Raises FrameError."""
    if len(data) > state.needed_bytes:
        raise FrameError(f"{len(data) - state.needed_bytes} bytes too many in a handshake")
    received = state.received + data
    if state.body_bytes is None:
        return Receiving(b"", handshake_bytes(received)) if len(received) == 4 else Receiving(received)
    return (
        Receiving(received, state.body_bytes)
        if len(received) < state.body_bytes
        else unpack_handshake(received)
    )


def settle(hello: Hello, admit: Admission, own_domains: Sequence[str]) -> Welcome | Refusal:
    """The acceptor's answer, its channel and transport fields except `domain` still empty."""
    refusal = _version_refusal(hello)
    if refusal is not None:
        return refusal
    domain = next((name for name in hello.domains if name in own_domains), None)
    if domain is None:
        offered = ", ".join(hello.domains) or "nothing"
        return Refusal(
            code="HandshakeError", message=f"you offer {offered}, this side has {', '.join(own_domains)}"
        )
    try:
        answer = admit(hello)
    except IsthmusError as error:
        return Refusal(code=type(error).__name__, message=str(error))
    return answer if isinstance(answer, Refusal) else msgspec.structs.replace(answer, domain=domain)


def judge(hello: Hello, answer: Handshake) -> Welcome:
    """What the calling side makes of the answer. Raises TokenError or HandshakeError (the peer's words)."""
    match answer:
        case Welcome(domain=domain) if domain in hello.domains:
            return answer
        case Welcome(domain=domain):
            raise HandshakeError(
                f"the peer chose fabric domain {domain!r}, offered were {', '.join(hello.domains)}"
            )
        case Refusal(code="TokenError", message=message):
            raise TokenError(message)
        case Refusal(code="HandshakeError", message=message):
            raise HandshakeError(message)
        case Refusal(code=code, message=message):
            raise HandshakeError(f"{code}: {message}")
        case _:
            raise HandshakeError("the peer answered Hello with Hello; this is not a listening address")


def _version_refusal(hello: Hello) -> Refusal | None:
    mine = {"python": python_version(), "frame format": FRAME_VERSION, "codec": CODEC_VERSION}
    yours = {"python": hello.python, "frame format": hello.frame_version, "codec": hello.codec_version}
    for what, version in mine.items():
        if yours[what] != version:
            return Refusal(
                code="HandshakeError",
                message=f"{what} version differs: the caller has {yours[what]}, the executor has {version}; "
                "run both with the same Python and isthmus versions",
            )
    return None


# the calling side -------------------------------------------------------------------------------------------
def dial(address: str, timeout_s: float) -> socket.socket:
    """A connected socket. Raises PeerLostError when nobody listens there or does not answer in time."""
    family, target = parse_address(address)
    deadline_s = time.monotonic() + timeout_s
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        while True:
            sock.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                sock.connect(target)
                return sock
            except (
                BlockingIOError
            ):  # a Unix listener whose backlog is full; the kernel offers no event to wait for
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(_DIAL_RETRY_S)
    except (OSError, ValueError) as error:
        sock.close()
        raise PeerLostError(
            f"nobody answers at {address}: {error}; is the executor still running?"
        ) from error


def greet(sock: socket.socket, hello: Hello, timeout_s: float) -> Welcome:
    """Say Hello, wait for the answer, keep `sock` open. Raises TokenError, HandshakeError, PeerLostError."""
    deadline_s = time.monotonic() + timeout_s
    state: Receiving | Handshake = Receiving()
    try:
        sock.settimeout(timeout_s)
        sock.sendall(pack_handshake(hello))
        while isinstance(state, Receiving):
            sock.settimeout(max(deadline_s - time.monotonic(), 0.001))
            data = sock.recv(state.needed_bytes)
            if not data:
                raise PeerLostError("the peer closed the connection during the handshake")
            state = step(state, data)
    except FrameError as error:
        raise HandshakeError(f"the peer does not speak isthmus: {error}") from error
    except OSError as error:
        raise PeerLostError(f"the peer did not finish the handshake within {timeout_s} s: {error}") from error
    return judge(hello, state)


# the accepting side -----------------------------------------------------------------------------------------
class _Caller:
    """A connected stranger until its Hello is complete."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self.sock = sock
        self.deadline_s = deadline_s
        self.state = Receiving()

    def read(self) -> Hello | None:
        """The Hello once it is complete. Raises FrameError or OSError when there will never be one."""
        data = self.sock.recv(self.state.needed_bytes)
        if not data:
            raise FrameError("closed before its Hello was complete")
        match step(self.state, data):
            case Receiving() as state:
                self.state = state
                return None
            case Hello() as hello:
                return hello
            case other:
                raise FrameError(f"the first message must be Hello, not {type(other).__name__}")


class Reception:
    """One listening address and the callers whose Hello is still incomplete.

    `fileno()` is readable when `arrivals` has something to do; call it also every `wait_s()` seconds, for the
    deadlines. `turned_away` counts callers that were cut off before they were anybody.
    """

    def __init__(self, address: str) -> None:
        """Raises FabricError when the address is malformed or taken."""
        self._listener = _listen(address)
        self.address = format_address(self._listener)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._callers: dict[int, _Caller] = {}  # by descriptor, oldest first
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.turned_away = 0

    def fileno(self) -> int:
        return self._epoll.fileno()

    def wait_s(self) -> float | None:
        """Seconds until the next handshake deadline; None: no handshake is under way."""
        for caller in self._callers.values():
            return max(caller.deadline_s - time.monotonic(), 0.0)
        return None

    def has_work(self) -> bool:
        """Whether `arrivals` would do anything: bytes have come, or a deadline has passed."""
        return self.wait_s() == 0.0 or bool(self._epoll.poll(0, 1))

    def arrivals(self) -> list[tuple[socket.socket, Hello]]:
        """Callers that have said Hello since the last time; their sockets are yours to answer and close."""
        done: list[tuple[socket.socket, Hello]] = []
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                self._accept_all()
            elif (caller := self._callers.get(descriptor)) is not None:
                hello = self._read(caller)
                if hello is not None:
                    done.append((self._release(caller), hello))
        self._expire()
        return done

    def close(self) -> None:
        """Close and, for a Unix socket, remove its path. Idempotent."""
        if self._epoll.closed:
            return
        if self._listener.family == socket.AF_UNIX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._listener.getsockname())
        self.abandon()

    def abandon(self) -> None:
        """Close descriptors only: what a forked child does with its parent's Reception."""
        if self._epoll.closed:
            return
        for caller in self._callers.values():
            caller.sock.close()
        self._callers.clear()
        self._listener.close()
        self._epoll.close()
        os.close(self._spare)

    def _accept_all(self) -> None:
        for _ in range(_ACCEPTS_MAX):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except (
                OSError
            ) as error:  # else: the caller was gone before we got to it, or the kernel is short of memory
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._refuse_one()
                return
            tune(sock)
            self._callers[sock.fileno()] = _Caller(sock, time.monotonic() + HANDSHAKE_S)
            self._epoll.register(sock, select.EPOLLIN)
            if len(self._callers) > CALLERS_MAX:
                self._turn_away(next(iter(self._callers.values())))

    def _refuse_one(self) -> None:
        """Out of descriptors: take one caller off the backlog by the spare one, else it wakes us for ever."""
        self.turned_away += 1
        os.close(self._spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _read(self, caller: _Caller) -> Hello | None:
        try:
            return caller.read()
        except BlockingIOError:
            return None
        except (FrameError, OSError):
            self._turn_away(caller)
            return None

    def _expire(self) -> None:
        now_s = time.monotonic()
        for caller in list(self._callers.values()):
            if caller.deadline_s > now_s:
                return  # oldest first, and all have the same time
            self._turn_away(caller)

    def _turn_away(self, caller: _Caller) -> None:
        self.turned_away += 1
        self._release(caller).close()

    def _release(self, caller: _Caller) -> socket.socket:
        self._epoll.unregister(caller.sock)
        del self._callers[caller.sock.fileno()]
        return caller.sock


def answer(sock: socket.socket, message: Welcome | Refusal) -> bool:
    """Send the acceptor's answer on a socket that is still empty; False when the caller is gone."""
    data = pack_handshake(message)
    try:
        return sock.send(data, socket.MSG_NOSIGNAL) == len(data)
    except OSError:
        return False


def _listen(address: str) -> socket.socket:
    family, target = parse_address(address)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_UNIX:
            _remove_stale(str(target))
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise FabricError(f"cannot listen at {address}: {error}; choose another address") from error
    return sock


def _remove_stale(path: str) -> None:
    """Unlink a socket file whose listener is dead; a live one makes the following bind fail, as it should."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            return
