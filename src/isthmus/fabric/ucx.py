"""The native fabric domain: frames travel by UCX, urgent ones and the peer's death by the bootstrap socket.

`_ucx.Engine` and `_ucx.Link` (native/module.cpp) do everything hot; here is what happens seldom: handshakes,
urgent frames, deaths. A peer that has only sockets gets a channel of an embedded SocketDomain, polled
through the same epoll.

Invariants: frames of one channel arrive in order, LOST after the last; a peer that closes in order says on
its socket how many frames it has sent by UCX, so that none is lost between two transports; a forked child
keeps no descriptor of its parent's channels, or a dead parent would seem alive to its peers.
Not here: finding UCX (`libraries.py`), frames on sockets (`streams.py`, `sockets.py`).
"""

import contextlib
import fcntl
import itertools
import os
import re
import secrets
import select
import socket
import weakref
from collections.abc import Callable

import msgspec

from isthmus.core.errors import (
    FabricError,
    FrameError,
    FunctionLoadError,
    HandshakeError,
    PeerLostError,
)
from isthmus.fabric import _ucx, bootstrap, libraries, natives
from isthmus.fabric.channels import Admission, Frame, Meter
from isthmus.fabric.frames import Hello, Kind, Refusal, Welcome
from isthmus.fabric.sockets import SocketChannel, SocketDomain
from isthmus.fabric.streams import Ends, FrameStream

_READABLE = select.EPOLLIN | select.EPOLLRDHUP
_LANE = re.compile(r"lane\[\d+\]:\s+\d+:(\S+?)(?:\.\d+)?\s+md\[")
# Lanes in memory of this machine: what a process has written there stays readable when it is dead.
_NEAR = frozenset({"self/memory", "posix/memory", "sysv/memory", "cma/memory", "xpmem/memory", "knem/memory"})
_TICK = -1  # the descriptor under which the engine reports that time passes

_domains: "weakref.WeakSet[UcxDomain]" = weakref.WeakSet()


class UcxChannel(_ucx.Link):
    """See channels.Channel; `send` and `call` are native. Made by a UcxDomain only."""

    def __init__(self, domain: "UcxDomain", ends: Ends) -> None:
        super().__init__(domain, ends.own_id, ends.own_key)
        self._domain = domain
        self._peer: Hello | Welcome | None = None
        self._stream: FrameStream | None = None
        self._transport = ""
        self.shares = False  # each side shows the other an arena, or says that it has none
        self.awaits_arena = False
        self.meters: list[Meter] = []  # native functions count into them
        self.frames_expected = 0  # how many the peer has sent, once it has said GOODBYE

    def begin(self, sock: socket.socket, peer: Hello | Welcome) -> None:
        """The handshake is over. Raises HandshakeError when no UCX transport reaches the peer."""
        ids = peer.channel_id, peer.channel_key, peer.ucx_address
        try:
            near = peer.host == bootstrap.host_identity()
            self._attach(*ids, recovers=not near)
            if near and not _NEAR.issuperset(self._lanes()):
                self._attach(*ids, recovers=True)
        except RuntimeError as error:
            raise HandshakeError(
                f"no UCX transport reaches the peer: {error}; see `isthmus fabric`"
            ) from error
        self._peer = peer
        self.shares = near and sock.family == socket.AF_UNIX
        ends = Ends(self.id, self.own_key, peer.channel_id, peer.channel_key)
        self._stream = FrameStream(sock, ends, False)
        self.socket = sock

    def show_arena(self, sock: socket.socket) -> None:
        """Give the peer a descriptor of the shared memory in which our large data will be."""
        descriptors = []
        if _NEAR.issuperset(self._lanes()):
            with contextlib.suppress(RuntimeError):  # no room for it: large data goes by UCX then
                descriptors.append(self._open_arena())
        try:
            socket.send_fds(sock, [b"A"], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def see_arena(self, sock: socket.socket) -> None:
        """Take the peer's, if it has one. Raises OSError, and FrameError when it is none."""
        _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
        self.awaits_arena = False
        try:
            for descriptor in descriptors:
                self._map_arena(descriptor)
        except RuntimeError as error:
            raise FrameError(str(error)) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    @property
    def peer(self) -> Hello | Welcome:
        assert self._peer is not None
        return self._peer

    @property
    def stream(self) -> FrameStream:
        assert self._stream is not None
        return self._stream

    @property
    def transport(self) -> str:
        if not self._transport:
            self._transport = f"ucx:{','.join(self._lanes())}"
        return self._transport

    def has_ended(self) -> bool:
        return not self.alive or self.stream.has_ended()

    def _lanes(self) -> list[str]:
        return list(dict.fromkeys(_LANE.findall(self._describe())))

    def send_urgent(self, kind: int, call_id: int, meta: bytes = b"") -> None:
        self._domain._require_usable()
        self.stream.send_urgent(kind, call_id, meta)
        if self.stream.backlog:
            self._domain._watch(self.stream.fileno(), _READABLE | select.EPOLLOUT)

    def close(self) -> None:
        self._domain.close_channel(self)


class UcxDomain(_ucx.Engine):
    """See channels.Domain; `poll`, `wake` and `spin_ns` of UCX are native.

    library   path of a libucp.so.0; empty: found by `libraries`
    """

    def __init__(self, library: str = "") -> None:
        self.library = libraries.load(library)
        self.malformed_peers = 0
        try:
            with libraries.defaults():
                super().__init__(Frame, PeerLostError, FabricError)
        except RuntimeError as error:
            raise FabricError(
                f"UCX {self.library.version} ({self.library.path}) does not start: {error}"
            ) from error
        self._numbers = itertools.count(1)
        self._channels: dict[int, UcxChannel] = {}
        self._watched: dict[int, Callable[[int], None]] = {}
        self._receptions: list[bootstrap.Reception] = []
        self._sockets: SocketDomain | None = None
        self._signal = 0
        _domains.add(self)

    @property
    def name(self) -> str:
        return "ucx"

    # channels -----------------------------------------------------------------------------------------------
    def listen(self, address: str, admit: Admission) -> str:
        self._require_usable()
        reception = bootstrap.Reception(address)
        self._receptions.append(reception)
        self._watch_with(reception.fileno(), lambda _: self._receive_callers(reception, admit))
        return reception.address

    def connect(self, address: str, hello: Hello, timeout_s: float = 5.0) -> UcxChannel | SocketChannel:
        self._require_usable()
        channel = self._new_channel()  # frames may come by UCX before the Welcome is read
        hello = msgspec.structs.replace(
            hello, channel_id=channel.id, channel_key=channel.own_key, domains=("ucx", "sockets"),
            host=bootstrap.host_identity(), ucx_address=self._address(),
        )  # fmt: skip
        try:
            sock = bootstrap.dial(address, timeout_s)
            with contextlib.ExitStack() as undo:
                undo.callback(sock.close)
                welcome = bootstrap.greet(sock, hello, timeout_s)
                if welcome.domain == "ucx":
                    channel.begin(sock, welcome)
                    _swap_arenas(channel, sock)
                undo.pop_all()
        except BaseException:
            channel._detach()
            raise
        if welcome.domain == "ucx":
            self._keep(channel, sock)
            return channel
        channel._detach()
        ends = Ends(channel.id, channel.own_key, welcome.channel_id, welcome.channel_key)
        return self._embedded().adopt(sock, ends, welcome)

    def channel(self, channel_id: int) -> UcxChannel | SocketChannel | None:
        self._require_usable()
        found = self._channels.get(channel_id)
        return found if found or self._sockets is None else self._sockets.channel(channel_id)

    def close_channel(self, channel: UcxChannel) -> None:
        """Say GOODBYE, wait a moment for what was sent to leave, free everything. Idempotent."""
        if self._channels.pop(channel.id, None) is None:
            return
        self._require_usable()
        stream = channel.stream
        with contextlib.suppress(FabricError):
            if channel.alive and channel.send(Kind.GOODBYE, 0, 0, b""):
                stream.send_urgent(Kind.GOODBYE, channel._frames_out)
        channel._detach()
        self._forget(stream.fileno())
        stream.close()

    def _new_channel(self) -> UcxChannel:
        return UcxChannel(self, Ends(next(self._numbers), secrets.randbits(64) | 1, 0, 0))

    def _keep(self, channel: UcxChannel, sock: socket.socket) -> None:
        bootstrap.tune(sock)
        self._channels[channel.id] = channel
        self._watch_with(sock.fileno(), lambda events: self._hear(channel, events))
        self._announce(sock.fileno())

    def _embedded(self) -> SocketDomain:
        if self._sockets is None:
            self._sockets = SocketDomain()
            self._watch_with(self._sockets.fileno(), lambda _: self._poll_sockets())
            if self._signal:
                self._sockets.announce(self._signal)
        return self._sockets

    # what the engine calls while it is polled ---------------------------------------------------------------
    def _attend(self, descriptor: int, events: int) -> None:
        """A watched descriptor is ready, or (_TICK) half a second has passed."""
        if descriptor == _TICK:
            for reception in self._receptions:
                self._watched[reception.fileno()](0)
        elif (handle := self._watched.get(descriptor)) is not None:
            handle(events)

    def _native_failed(self, channel_id: int, call_id: int, function_id: int, code: int) -> None:
        """A native function returned an error code instead of a result."""
        channel = self._channels.get(channel_id)
        if channel is not None:
            meta, data = natives.failure(str(function_id), code)
            with contextlib.suppress(PeerLostError):
                channel.send(Kind.ERROR, call_id, function_id, meta, data)

    def _receive_callers(self, reception: bootstrap.Reception, admit: Admission) -> None:
        for sock, hello in reception.arrivals():
            self._settle(sock, hello, admit)
        self._want_ticks(any(each.wait_s() is not None for each in self._receptions))

    def _settle(self, sock: socket.socket, hello: Hello, admit: Admission) -> None:
        answer = bootstrap.settle(hello, admit, ("ucx", "sockets"))
        if isinstance(answer, Refusal):
            bootstrap.answer(sock, answer)
            sock.close()
            return
        if answer.domain == "ucx":
            answer = self._welcome_native(sock, hello, answer)
        if answer.domain == "sockets":
            self._welcome_sockets(sock, hello, answer)

    def _welcome_native(self, sock: socket.socket, hello: Hello, welcome: Welcome) -> Welcome:
        """Open the native channel; the Welcome says `sockets` instead when UCX does not reach the caller."""
        channel = self._new_channel()
        try:
            channel.begin(sock, hello)
        except HandshakeError:
            channel._detach()
            return msgspec.structs.replace(welcome, domain="sockets")
        self._keep(channel, sock)
        welcome = _complete(welcome, channel.id, channel.own_key, self._address())
        if bootstrap.answer(sock, welcome) and channel.shares:  # else the end of file says that it is gone
            channel.awaits_arena = True
            with contextlib.suppress(OSError):
                channel.show_arena(sock)
        return welcome

    def _welcome_sockets(self, sock: socket.socket, hello: Hello, welcome: Welcome) -> None:
        number, key = next(self._numbers), secrets.randbits(64) | 1
        self._embedded().adopt(sock, Ends(number, key, hello.channel_id, hello.channel_key), hello)
        bootstrap.answer(sock, _complete(welcome, number, key, b""))

    def _hear(self, channel: UcxChannel, events: int) -> None:
        """Something on a bootstrap socket: urgent frames, room to send, or its end."""
        stream, reason = channel.stream, ""
        if events & select.EPOLLOUT:
            stream.flush()
            self._watch(stream.fileno(), _READABLE | (select.EPOLLOUT if stream.backlog else 0))
        frames = []
        try:
            if channel.awaits_arena:
                channel.see_arena(channel.socket)
            frames = stream.receive()
        except BlockingIOError:
            pass
        except (FrameError, OSError) as error:
            frames, reason = stream.salvage(), f"the peer does not speak frames: {error}"
            self.malformed_peers += 1
        for frame in frames:
            if frame.kind == Kind.GOODBYE:
                channel.frames_expected = frame.call_id
            else:
                self._push(frame)
        if stream.ended or reason:
            self._bury(channel, reason or stream.reason)

    def _bury(self, channel: UcxChannel, reason: str) -> None:
        self._forget(channel.stream.fileno())
        channel._lose(reason, channel.frames_expected)
        channel.stream.close(reason)

    def _poll_sockets(self) -> None:
        assert self._sockets is not None
        while (frame := self._sockets.poll(0.0)) is not None:
            self._push(frame)

    def _watch_with(self, descriptor: int, handle: Callable[[int], None]) -> None:
        self._watched[descriptor] = handle
        self._watch(descriptor, _READABLE)

    def _forget(self, descriptor: int) -> None:
        if self._watched.pop(descriptor, None) is not None:
            self._unwatch(descriptor)

    # the rest of the contract -------------------------------------------------------------------------------
    def wake(self) -> None:
        self._require_usable()
        super().wake()
        if self._sockets is not None:
            self._sockets.wake()

    def define_native(
        self, channel_id: int, function_id: int, library: str, symbol: str, result_bytes_max: int,
        meter: Meter | None = None,
    ) -> None:  # fmt: skip
        channel = self.channel(channel_id)
        if channel is None:
            raise FabricError(
                f"no channel {channel_id}: the peer that defined function {function_id} is gone"
            )
        if isinstance(channel, SocketChannel):
            assert self._sockets is not None
            return self._sockets.define_native(
                channel_id, function_id, library, symbol, result_bytes_max, meter
            )
        channel.meters += [meter] if meter is not None else []
        try:
            channel._define(function_id, library, symbol, result_bytes_max, *(meter or ()))
        except ValueError as error:
            raise FunctionLoadError(f"native function {symbol} of {library}: {error}") from error

    def announce(self, signal_number: int) -> None:
        self._signal = signal_number
        for channel in self._channels.values():
            self._announce(channel.stream.fileno())
        if self._sockets is not None:
            self._sockets.announce(signal_number)

    def _announce(self, descriptor: int) -> None:
        if not self._signal:
            return
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, self._signal)
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)

    def spin_ns(self) -> int:
        return super().spin_ns() + (self._sockets.spin_ns() if self._sockets is not None else 0)

    def close(self) -> None:
        if not self._usable:
            raise FabricError("this domain belongs to the parent process")
        if self._closed:
            return
        for channel in list(self._channels.values()):
            self.close_channel(channel)
        for reception in self._receptions:
            self._forget(reception.fileno())
            reception.close()
        if self._sockets is not None:
            self._forget(self._sockets.fileno())
            self._sockets.close()
        self._close()

    def abandon(self) -> None:
        """In a forked child: let go of the descriptors, touch nothing else."""
        for channel in self._channels.values():
            channel.stream.close()
        for reception in self._receptions:
            reception.abandon()


def _complete(welcome: Welcome, channel_id: int, channel_key: int, ucx_address: bytes) -> Welcome:
    return msgspec.structs.replace(
        welcome, channel_id=channel_id, channel_key=channel_key, ucx_address=ucx_address, pid=os.getpid(),
        host=bootstrap.host_identity(),
    )  # fmt: skip


def _swap_arenas(channel: UcxChannel, sock: socket.socket) -> None:
    """The connecting side's half. Raises PeerLostError or HandshakeError."""
    if not channel.shares:
        return
    try:
        channel.show_arena(sock)
        channel.see_arena(sock)
    except FrameError as error:
        raise HandshakeError(f"the peer's shared memory cannot be used: {error}") from error
    except OSError as error:
        raise PeerLostError(f"the peer is gone: {error}") from error


def _abandon_all() -> None:
    for domain in list(_domains):
        domain.abandon()


os.register_at_fork(after_in_child=_abandon_all)
