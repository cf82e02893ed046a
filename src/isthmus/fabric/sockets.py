"""The plain-Python fabric domain: one stream socket per channel, one epoll for all of them.

It passes the same suite as the native domain and needs no compiler, no UCX and no special hardware. A small
frame costs a system call on each side; large data between processes of one host goes by memfd with one copy.

Invariants: a channel's frames come out of `poll` in the order of their arrival, and Kind.LOST after the last
of them; a peer that does not speak frames loses its channel and is counted in `malformed_peers`, nobody else
notices.
Not here: the handshake (`bootstrap`), frames on a socket (`streams`), native functions (`natives`)."""

import contextlib
import fcntl
import itertools
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

import msgspec

from isthmus.core.errors import FabricError, FrameError, PeerLostError
from isthmus.fabric import bootstrap
from isthmus.fabric.channels import Admission, Buffer, Frame, Meter
from isthmus.fabric.frames import DATA_BYTES_MAX, Hello, Kind, Refusal, Welcome
from isthmus.fabric.natives import NativeFunction
from isthmus.fabric.streams import SCRATCH_BYTES, Ends, FrameStream, lost

INBOX_FRAMES_MAX = 65536  # frames nobody has asked for yet; a peer that goes beyond ignores its credits
LINGER_S = 1.0  # what `close` waits at most for a slow peer to take what was sent before
_SLEEP_S_MAX = 3600.0  # epoll counts milliseconds in an int
_ROOM_WAIT_S = 0.001  # between two attempts of `call` on a channel that is full
_TURN_S = 0.01  # after this long a thread that waits for its turn wakes the one that has it
_EVENTS_MAX = 64
MALFORMED = "the peer does not speak frames"  # how the reason of such a LOST begins
_CLOSED = "the fabric domain is closed"
_FORKED = "the fabric domain belongs to the parent process; open one after the fork"
_READABLE = select.EPOLLIN | select.EPOLLRDHUP
_ANSWERS = frozenset({Kind.RESULT, Kind.ERROR, Kind.REFUSED, Kind.YIELD})


class SocketChannel:
    """See channels.Channel. Only a SocketDomain makes one."""

    def __init__(
        self, domain: "SocketDomain", stream: FrameStream, peer: Hello | Welcome, transport: str
    ) -> None:
        self.stream = stream
        self.id = stream.ends.own_id
        self.peer = peer
        self.transport = transport
        self._domain = domain

    @property
    def alive(self) -> bool:
        return not self.stream.reason

    @property
    def unsent(self) -> bool:
        return self.stream.backlog and self.alive

    def has_ended(self) -> bool:
        return self.stream.has_ended()

    def send(
        self, kind: int, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer] = (),
        deadline_ns: int = 0, flags: int = 0, credits: int = 0,
    ) -> bool:  # fmt: skip
        self._domain.check()
        sent = self.stream.send(kind, call_id, function_id, meta, data, deadline_ns, flags, credits)
        if self.stream.backlog:
            self._domain.arm(self.stream)
        return sent

    def call(self, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer], deadline_ns: int,
             spin_s: float, timeout_s: float) -> Frame | None:  # fmt: skip
        return self._domain.call(self, call_id, function_id, meta, data, deadline_ns, spin_s, timeout_s)

    def send_urgent(self, kind: int, call_id: int, meta: bytes = b"") -> None:
        self._domain.check()
        self.stream.send_urgent(kind, call_id, meta)
        if self.stream.backlog:
            self._domain.arm(self.stream)

    def close(self) -> None:
        self._domain.close_channel(self)


class SocketDomain:
    """See channels.Domain. A peer that sends more than `data_bytes_max` in one frame loses its channel."""

    name = "sockets"

    def __init__(self, data_bytes_max: int = DATA_BYTES_MAX) -> None:
        self.malformed_peers = 0
        self._data_bytes_max = data_bytes_max
        self._epoll = select.epoll()
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._alarm, select.EPOLLIN)
        self._unusable = ""  # why, once it is
        self._lock = threading.Lock()
        self._driver = 0  # the thread that holds the lock
        self._waiters: set[int] = set()  # threads that want to be the driver
        self._woken = False
        self._numbers = itertools.count(1)
        self._channels: dict[int, SocketChannel] = {}
        self._by_descriptor: dict[int, SocketChannel] = {}
        self._receptions: dict[int, tuple[bootstrap.Reception, Admission]] = {}
        self._inbox: deque[Frame] = deque()
        self._awaited: tuple[int, int] | None = None  # (channel id, call id) of the `call` under way
        self._answer: Frame | None = None
        self._natives: dict[tuple[int, int], NativeFunction] = {}
        self._scratch = bytearray(SCRATCH_BYTES)
        self._signal_number = 0
        self._spin_ns = 0
        _domains.add(self)

    def fileno(self) -> int:
        """Readable when `poll` has something to do: for a loop or a domain that embeds this one."""
        return self._epoll.fileno()

    def check(self) -> None:
        """Raises FabricError when the domain is closed or belongs to the parent of this process."""
        if self._unusable:
            raise FabricError(self._unusable)

    # channels -----------------------------------------------------------------------------------------------
    def listen(self, address: str, admit: Admission) -> str:
        self.check()
        reception = bootstrap.Reception(address)
        self._receptions[reception.fileno()] = reception, admit
        self._epoll.register(reception.fileno(), select.EPOLLIN)
        return reception.address

    def connect(self, address: str, hello: Hello, timeout_s: float = 5.0) -> SocketChannel:
        self.check()
        return self.adopt(*self.greet(address, hello, timeout_s))

    def greet(self, address: str, hello: Hello, timeout_s: float) -> tuple[socket.socket, Ends, Welcome]:
        """The slow half of `connect`, for a thread of its own: `adopt` what it gives. Raises as `connect`."""
        number, key = self._new_name()
        hello = msgspec.structs.replace(
            hello, channel_id=number, channel_key=key, domains=(self.name,), host=bootstrap.host_identity()
        )
        sock = bootstrap.dial(address, timeout_s)
        try:
            welcome = bootstrap.greet(sock, hello, timeout_s)
        except BaseException:
            sock.close()
            raise
        return sock, Ends(number, key, welcome.channel_id, welcome.channel_key), welcome

    def channel(self, channel_id: int) -> SocketChannel | None:
        self.check()
        return self._channels.get(channel_id)

    def close_channel(self, channel: SocketChannel) -> None:
        """Say GOODBYE, give what was sent a moment to leave, free everything. Idempotent."""
        self.check()
        mine = self._take_turn(LINGER_S)  # a signal handler that polls must not bury it meanwhile
        try:
            if self._channels.get(channel.id) is not channel:
                return
            with contextlib.suppress(PeerLostError):
                channel.stream.send(Kind.GOODBYE, 0, 0, b"", always=True)
                channel.stream.linger(LINGER_S)
            self._forget(channel)
            channel.stream.close()
            self._inbox = deque(frame for frame in self._inbox if frame.channel_id != channel.id)
        finally:
            if mine:
                self._end_turn()

    def _new_name(self) -> tuple[int, int]:
        return next(self._numbers), secrets.randbits(64)

    def adopt(self, sock: socket.socket, ends: Ends, peer: Hello | Welcome) -> SocketChannel:
        """A channel on a socket whose handshake is over."""
        bootstrap.tune(sock)
        unix = sock.family == socket.AF_UNIX
        shares = unix and peer.host == bootstrap.host_identity()
        stream = FrameStream(sock, ends, shares, self._scratch, self._data_bytes_max)
        transport = f"sockets:{'unix' if unix else 'tcp'}{'+memfd' if shares else ''}"
        channel = SocketChannel(self, stream, peer, transport)
        self._channels[channel.id] = channel
        self._by_descriptor[stream.fileno()] = channel
        self._subscribe(stream)
        self._epoll.register(stream.fileno(), _READABLE)
        return channel

    def _receive_callers(self, reception: bootstrap.Reception, admit: Admission) -> None:
        for sock, hello in reception.arrivals():
            answer = bootstrap.settle(hello, admit, (self.name,))
            if isinstance(answer, Refusal):
                bootstrap.answer(sock, answer)
                sock.close()
                continue
            number, key = self._new_name()
            welcome = msgspec.structs.replace(
                answer, channel_id=number, channel_key=key, pid=os.getpid(), host=bootstrap.host_identity()
            )
            if bootstrap.answer(sock, welcome):
                self.adopt(sock, Ends(number, key, hello.channel_id, hello.channel_key), hello)
            else:
                sock.close()

    def _bury(self, channel: SocketChannel, reason: str) -> None:
        """The peer is gone: hand out LOST, once, and free everything."""
        self._forget(channel)
        channel.stream.close(reason)
        self._inbox.append(lost(channel.id, reason))

    def _forget(self, channel: SocketChannel) -> None:
        del self._channels[channel.id]
        del self._by_descriptor[channel.stream.fileno()]
        self._epoll.unregister(channel.stream.fileno())
        for key in [key for key in self._natives if key[0] == channel.id]:
            del self._natives[key]

    # progress -----------------------------------------------------------------------------------------------
    def poll(self, timeout_s: float, spin_s: float = 0.0) -> Frame | None:
        self.check()
        if not self._inbox and self._take_turn(timeout_s):
            try:
                self._drive(time.monotonic() + timeout_s, spin_s)
            finally:
                self._end_turn()
        try:
            return self._inbox.popleft()
        except IndexError:
            return None

    def call(
        self, channel: SocketChannel, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer],
        deadline_ns: int, spin_s: float, timeout_s: float,
    ) -> Frame | None:  # fmt: skip
        """See Channel.call. A `wake` does not end it, but stays pending for the next `poll`."""
        self.check()
        deadline_s = time.monotonic() + timeout_s
        if not self._take_turn(timeout_s):
            if self._driver == threading.get_ident():
                raise FabricError("call() from inside poll() or call() of the same thread")
            return None
        self._awaited = channel.id, call_id
        try:
            while not channel.send(Kind.CALL, call_id, function_id, meta, data, deadline_ns):
                if time.monotonic() > deadline_s:
                    return None
                self._progress(_ROOM_WAIT_S)
            self._drive(deadline_s, spin_s)
            if self._answer is None and not channel.alive:
                raise PeerLostError(channel.stream.reason)
            return self._answer
        finally:
            self._awaited = self._answer = None
            if self._inbox:  # frames for others: `fileno` must say so
                self.wake()
            self._end_turn()

    def wake(self) -> None:
        self.check()
        os.eventfd_write(self._alarm, 1)

    def spin_ns(self) -> int:
        return self._spin_ns

    def _take_turn(self, timeout_s: float) -> bool:
        """One thread drives. False: it is this one already (in a signal handler), or another all the time."""
        if self._driver == threading.get_ident():
            return False
        free = not self._waiters and self._lock.acquire(blocking=False)
        if not free and not self._wait_for_turn(time.monotonic() + timeout_s):
            return False
        self._driver = threading.get_ident()
        return True

    def _wait_for_turn(self, deadline_s: float) -> bool:
        """Get the lock from a thread that may sleep, and before one that has just had it."""
        self._waiters.add(threading.get_ident())
        try:
            while not self._lock.acquire(timeout=max(min(deadline_s - time.monotonic(), _TURN_S), 0.0)):
                if time.monotonic() >= deadline_s:
                    return False
                self.wake()
            return True
        finally:
            self._waiters.discard(threading.get_ident())

    def _end_turn(self) -> None:
        self._driver = 0
        self._lock.release()

    def _drive(self, deadline_s: float, spin_s: float) -> None:
        """Until what this turn is for has come or the deadline has passed: look, spin, then sleep."""
        self._progress(0.0)
        if spin_s > 0 and not self._has_come():
            self._spin(min(deadline_s, time.monotonic() + spin_s))
        while not self._has_come():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            self._progress(min(left_s, _SLEEP_S_MAX))

    def _spin(self, until_s: float) -> None:
        began_ns = time.monotonic_ns()
        while not self._has_come() and time.monotonic() < until_s:
            self._progress(0.0)
        self._spin_ns += time.monotonic_ns() - began_ns

    def _has_come(self) -> bool:
        if self._awaited is not None:
            return self._answer is not None or self._awaited[0] not in self._channels
        if self._inbox:
            return True
        woken, self._woken = self._woken, False
        return woken or bool(self._unusable)

    def _progress(self, timeout_s: float) -> None:
        """Carry out what the kernel has for us, waiting at most timeout_s for the first of it."""
        if timeout_s > 0:
            for reception, _ in self._receptions.values():
                timeout_s = min(timeout_s, reception.wait_s() or timeout_s)
        for descriptor, events in self._epoll.poll(timeout_s, _EVENTS_MAX):
            channel = self._by_descriptor.get(descriptor)
            if channel is not None:
                self._serve(channel, events)
            elif descriptor == self._alarm:
                self._woken = True
                os.eventfd_read(self._alarm)
        for reception, admit in list(self._receptions.values()):
            if reception.has_work():
                self._receive_callers(reception, admit)

    def _serve(self, channel: SocketChannel, events: int) -> None:
        stream = channel.stream
        if events & select.EPOLLOUT:
            stream.flush()
            self._disarm(stream)
        if not events & ~select.EPOLLOUT:
            return
        try:
            frames, malformed = stream.receive(), ""
        except FrameError as error:
            self.malformed_peers += 1
            frames, malformed = stream.salvage(), f"{MALFORMED}: {error}"
        self._deliver(channel, frames)
        if malformed or stream.ended:
            self._bury(channel, malformed or stream.reason)
        elif len(self._inbox) > INBOX_FRAMES_MAX:
            self._bury(channel, f"the peer ignores its credits: {INBOX_FRAMES_MAX} frames wait here")

    def _deliver(self, channel: SocketChannel, frames: list[Frame]) -> None:
        for frame in frames:
            native = self._natives.get((frame.channel_id, frame.function_id)) if self._natives else None
            if native is not None and frame.kind == Kind.CALL:
                self._answer_natively(channel, frame, native)
            elif self._awaited == (frame.channel_id, frame.call_id) and self._takes(frame):
                self._answer = frame
            else:
                self._inbox.append(frame)

    def _takes(self, frame: Frame) -> bool:
        return self._answer is None and frame.kind in _ANSWERS

    # back-pressure of the sockets ---------------------------------------------------------------------------
    def arm(self, stream: FrameStream) -> None:
        """Something waits for the socket to take more: have the next `poll` send it."""
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile by the thread that polls
            self._epoll.modify(stream.fileno(), _READABLE | select.EPOLLOUT)

    def _disarm(self, stream: FrameStream) -> None:
        if not stream.backlog:
            self._epoll.modify(stream.fileno(), _READABLE)
        if stream.backlog:  # another thread sent in between and its `arm` was undone
            self.arm(stream)

    # native functions ---------------------------------------------------------------------------------------
    def define_native(
        self, channel_id: int, function_id: int, library: str, symbol: str, result_bytes_max: int,
        meter: Meter | None = None,
    ) -> None:  # fmt: skip
        self.check()
        self._natives[channel_id, function_id] = NativeFunction(library, symbol, result_bytes_max, meter)

    def _answer_natively(self, channel: SocketChannel, frame: Frame, native: NativeFunction) -> None:
        kind, (meta, _) = native.answer_metered(frame)
        with contextlib.suppress(PeerLostError):  # its LOST follows by itself
            channel.stream.send(kind, frame.call_id, frame.function_id, meta, always=True)
            if channel.stream.backlog:
                self.arm(channel.stream)

    # signals, fork and the end ------------------------------------------------------------------------------
    def announce(self, signal_number: int) -> None:
        self.check()
        self._signal_number = signal_number
        for channel in list(self._channels.values()):
            self._subscribe(channel.stream)

    def _subscribe(self, stream: FrameStream) -> None:
        if self._signal_number:
            fcntl.fcntl(stream.fileno(), fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(stream.fileno(), fcntl.F_SETSIG, self._signal_number)
            flags = fcntl.fcntl(stream.fileno(), fcntl.F_GETFL)
            fcntl.fcntl(stream.fileno(), fcntl.F_SETFL, flags | os.O_ASYNC)

    def close(self) -> None:
        if self._unusable == _CLOSED:
            return
        self.check()
        for channel in list(self._channels.values()):
            self.close_channel(channel)
        for reception, _ in self._receptions.values():
            reception.close()
        self._unusable = _CLOSED
        os.eventfd_write(self._alarm, 1)
        with self._lock:
            self._free()

    def abandon(self) -> None:
        """In a forked child: close the descriptors, so that the parent's death still ends its channels."""
        if self._unusable:
            return
        self._unusable = _FORKED
        for channel in self._channels.values():
            channel.stream.close(self._unusable)
        for reception, _ in self._receptions.values():
            reception.abandon()
        self._free()

    def _free(self) -> None:
        self._channels.clear()
        self._by_descriptor.clear()
        self._receptions.clear()
        self._natives.clear()
        self._inbox.clear()
        self._epoll.close()
        os.close(self._alarm)


_domains: "weakref.WeakSet[SocketDomain]" = weakref.WeakSet()


def _abandon_all() -> None:
    for domain in list(_domains):
        domain.abandon()


os.register_at_fork(after_in_child=_abandon_all)
