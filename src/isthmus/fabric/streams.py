"""Frames on a connected stream socket, in both directions, without blocking.

A FrameStream is what a channel keeps of its bootstrap socket after the handshake: all there is for `sockets`
channels, and the carrier of urgent frames and of the peer's death for native ones.

Invariants: frames leave in the order of `send`, urgent ones before all that have not begun to leave; nothing
that was accepted is lost while the peer lives; what arrives before the end of file is handed out before
`ended` is set.
Not here: waiting for the socket (the domain does), and what frames mean."""

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from isthmus.core.errors import FabricError, FrameError, PeerLostError
from isthmus.fabric._memory import IOVECS_MAX, SHARED_BYTES_MIN, advance, allocate, receive_shared, share
from isthmus.fabric.channels import Buffer, Frame
from isthmus.fabric.frames import (
    DATA_BYTES_MAX,
    FRAME_VERSION,
    HEADER,
    HEADER_BYTES,
    Flag,
    Header,
    Kind,
    unpack_header,
)

QUEUE_BYTES_MAX = 4 * 2**20  # accepted but not yet taken by the kernel; beyond it `send` refuses
QUEUE_FRAMES_MAX = 1024
URGENT_FRAMES_MAX = 256
SCRATCH_BYTES = 256 * 1024
_READS_MAX = 32  # per `receive`, so that one busy peer does not starve the others
_COPY_BYTES_MAX = (
    64 * 1024
)  # smaller buffers are copied when they must wait, so that the caller may reuse them
_DESCRIPTORS_MAX = 64  # of shared data, received and not yet claimed by a frame
_ANCILLARY_BYTES = socket.CMSG_SPACE(16 * 4)


class Ends(NamedTuple):
    """How both sides name a channel: frames that arrive carry `own_*`, frames that leave carry `peer_*`."""

    own_id: int
    own_key: int
    peer_id: int
    peer_key: int


class _Parcel:
    """A frame on its way out: what is left of it, and the memfd that leaves with its first byte."""

    __slots__ = ("begun", "buffers", "descriptor", "size_bytes")

    def __init__(self, buffers: list[memoryview], descriptor: int) -> None:
        self.buffers = buffers
        self.size_bytes = sum(map(len, buffers))
        self.descriptor = descriptor
        self.begun = False

    def detach(self) -> None:
        """Copy small buffers: their owner may change them once `send` has returned."""
        self.buffers = [
            memoryview(bytes(buffer)) if len(buffer) < _COPY_BYTES_MAX else buffer for buffer in self.buffers
        ]

    def took(self, count: int) -> None:
        """The kernel took `count` bytes, and the descriptor with the first of them."""
        if count:
            self.begun = True
            self.drop_descriptor()
            self.size_bytes -= count
            self.buffers = advance(self.buffers, count)

    def drop_descriptor(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class FrameStream:
    """`shares`: both ends are on one host and the socket is a Unix one, so large data may go as a memfd.

    A frame that arrives with more than `data_bytes_max` is an error.
    """

    def __init__(
        self, sock: socket.socket, ends: Ends, shares: bool, scratch: bytearray | None = None,
        data_bytes_max: int = DATA_BYTES_MAX,
    ) -> None:  # fmt: skip
        self.ends = ends
        self.ended = False
        self.reason = ""
        self.dropped_frames = 0
        self._socket = sock
        self._shares = shares
        self._lock = threading.Lock()
        self._queue: deque[_Parcel] = deque()
        self._urgent: deque[_Parcel] = deque()
        self._queued_bytes = 0
        self._scratch = memoryview(scratch if scratch is not None else bytearray(SCRATCH_BYTES))
        self._arriving = _Arriving(ends, data_bytes_max)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def backlog(self) -> bool:
        """True while frames wait for the socket to become writable; then call `flush`."""
        return bool(self._queue or self._urgent)

    def has_ended(self) -> bool:
        """Whether the peer's end of file is here already; what came before it may be unread."""
        if self.ended or self.reason:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    # sending ------------------------------------------------------------------------------------------------
    def send(
        self, kind: int, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer] = (),
        deadline_ns: int = 0, flags: int = 0, credits: int = 0, always: bool = False,
    ) -> bool:  # fmt: skip
        """As Channel.send. `always`: even if the queue is full, for the domain's own few answers."""
        if self.reason:
            raise PeerLostError(self.reason)
        with self._lock:
            if self._queue and not always and self._is_full():
                return False
            buffers = [view for view in map(_flat, data) if len(view)]
            data_bytes = sum(map(len, buffers))
            descriptor = -1
            if self._shares and data_bytes >= SHARED_BYTES_MIN:
                descriptor = _shared(buffers, data_bytes)
                if descriptor >= 0:
                    buffers, flags = [], flags | Flag.SHARED
            header = HEADER.pack(
                FRAME_VERSION, kind, flags, self.ends.peer_id, self.ends.peer_key, call_id, deadline_ns,
                function_id, credits, len(meta), data_bytes, 0,
            )  # fmt: skip
            head = memoryview(header + meta)
            self._dispatch(_Parcel([head, *buffers], descriptor))
        return True

    def send_urgent(self, kind: int, call_id: int, meta: bytes = b"") -> None:
        """Raises PeerLostError, and FabricError when the peer has not read for far too long."""
        if self.reason:
            raise PeerLostError(self.reason)
        header = HEADER.pack(
            FRAME_VERSION, kind, 0, self.ends.peer_id, self.ends.peer_key, call_id, 0, 0, 0, len(meta), 0, 0
        )
        with self._lock:
            if len(self._urgent) >= URGENT_FRAMES_MAX:
                raise FabricError(f"{URGENT_FRAMES_MAX} urgent frames wait for a peer that does not read")
            self._urgent.append(_Parcel([memoryview(header + meta)], -1))
            self._drain()

    def flush(self) -> None:
        """Send what waits, as far as the socket takes it. Does nothing while another thread is sending."""
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            except PeerLostError:
                pass  # `receive` reports the death, after what arrived before it
            finally:
                self._lock.release()

    def _is_full(self) -> bool:
        return self._queued_bytes >= QUEUE_BYTES_MAX or len(self._queue) >= QUEUE_FRAMES_MAX

    def _dispatch(self, parcel: _Parcel) -> None:
        if not self.backlog:
            self._transmit(parcel)
            if not parcel.buffers:
                return
        parcel.detach()
        self._queue.append(parcel)
        self._queued_bytes += parcel.size_bytes

    def _drain(self) -> None:
        while self.backlog:
            begun = self._queue and self._queue[0].begun
            lane = self._queue if begun or not self._urgent else self._urgent
            parcel = lane[0]
            before_bytes = parcel.size_bytes
            self._transmit(parcel)
            if lane is self._queue:
                self._queued_bytes -= before_bytes - parcel.size_bytes
            elif parcel.begun and parcel.buffers:  # it must not be split by what the queue holds
                self._queue.appendleft(self._urgent.popleft())
                self._queued_bytes += parcel.size_bytes
            if parcel.buffers:
                return
            lane.popleft()

    def _transmit(self, parcel: _Parcel) -> None:
        """Hand the kernel as much as it takes. Raises PeerLostError."""
        while parcel.buffers:
            try:
                parcel.took(self._sendmsg(parcel))
            except BlockingIOError:
                return
            except OSError as error:
                if (
                    error.errno == errno.ETOOMANYREFS
                ):  # too many descriptors in flight: as good as a full socket
                    return
                parcel.drop_descriptor()
                self.reason = f"the peer is gone: {error}"
                raise PeerLostError(self.reason) from error

    def _sendmsg(self, parcel: _Parcel) -> int:
        if parcel.descriptor >= 0:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, parcel.descriptor.to_bytes(4, "little"))]
            return self._socket.sendmsg(parcel.buffers, rights, socket.MSG_NOSIGNAL)
        if len(parcel.buffers) == 1:
            return self._socket.send(parcel.buffers[0], socket.MSG_NOSIGNAL)
        return self._socket.sendmsg(parcel.buffers[:IOVECS_MAX], (), socket.MSG_NOSIGNAL)

    # receiving ----------------------------------------------------------------------------------------------
    def receive(self) -> list[Frame]:
        """Frames that are complete by now, without waiting. Sets `ended` (and `reason`) at the end of file.

        Raises FrameError when the peer does not speak frames; the frames before it are in `salvage`.
        """
        frames = self._arriving.frames
        for _ in range(_READS_MAX):
            if self.ended or not self._read():
                break
        self.dropped_frames = self._arriving.dropped_frames
        self._arriving.frames = []
        return frames

    def salvage(self) -> list[Frame]:
        """What had arrived in full before `receive` raised."""
        frames, self._arriving.frames = self._arriving.frames, []
        return frames

    def _read(self) -> bool:
        """One read; False when there is no more for now."""
        target = self._arriving.target()
        try:
            if target is not None:
                count = self._socket.recv_into(target)
            elif self._shares:
                count = self._receive_message()
            else:
                count = self._socket.recv_into(self._scratch)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(f"the link broke: {error}")
            return False
        if count == 0:
            self._end("the peer closed the connection")
            return False
        if target is not None:
            self._arriving.filled(count)
            return True
        self._arriving.feed(self._scratch[:count])
        return count == len(self._scratch)

    def _receive_message(self) -> int:
        count, ancillary, _, _ = self._socket.recvmsg_into(
            [self._scratch], _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._arriving.claim(memoryview(data[: len(data) - len(data) % 4]).cast("i").tolist())
        return count

    def _end(self, reason: str) -> None:
        self.ended = True
        self.reason = self.reason or reason

    # the end ------------------------------------------------------------------------------------------------
    def close(self, reason: str = "this side closed the channel") -> None:
        """Idempotent; what still waits to be sent is dropped."""
        self.reason = self.reason or reason
        self._socket.close()
        for parcel in (*self._queue, *self._urgent):
            parcel.drop_descriptor()
        self._queue.clear()
        self._urgent.clear()
        self._arriving.close()

    def linger(self, timeout_s: float) -> None:
        """Send what waits, for at most timeout_s, then say that nothing follows. Raises PeerLostError."""
        deadline_s = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        with self._lock:
            self._drain()
            while self.backlog and (left_s := deadline_s - time.monotonic()) > 0:
                poll.poll(left_s * 1000)
                self._drain()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


class _Arriving:
    """Cuts a stream of bytes into frames. Holds at most one incomplete frame."""

    def __init__(self, ends: Ends, data_bytes_max: int) -> None:
        self._data_bytes_max = data_bytes_max
        self.frames: list[Frame] = []
        self.dropped_frames = 0
        self._ends = ends
        self._head = bytearray()  # of an incomplete header
        self._header: Header | None = None
        self._meta = memoryview(b"")
        self._data: memoryview | None = None
        self._rest: list[memoryview] = []  # where the next bytes of the incomplete frame belong
        self._descriptors: deque[int] = deque()

    def target(self) -> memoryview | None:
        """Where the next bytes may be read to directly; None: nowhere, `feed` them."""
        if self._rest and len(self._rest[0]) >= SCRATCH_BYTES:
            return self._rest[0]
        return None

    def filled(self, count: int) -> None:
        """`count` bytes were read into `target`."""
        self._rest = advance(self._rest, count)
        if not self._rest:
            self._complete()

    def feed(self, data: memoryview) -> None:
        while len(data):
            data = self._take_header(data) if self._header is None else self._take_body(data)

    def claim(self, descriptors: list[int]) -> None:
        """Shared data that frames will refer to, in their order."""
        self._descriptors.extend(descriptors)
        if len(self._descriptors) > _DESCRIPTORS_MAX:
            raise FrameError(f"{len(self._descriptors)} descriptors without frames")

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popleft())
        self._rest.clear()

    def _take_header(self, data: memoryview) -> memoryview:
        missing = HEADER_BYTES - len(self._head)
        if self._head or len(data) < HEADER_BYTES:
            self._head += data[:missing]
            if len(self._head) < HEADER_BYTES:
                return data[missing:]
            header = unpack_header(self._head)
            self._head = bytearray()
        else:
            header = unpack_header(data[:HEADER_BYTES])
        self._begin(header)
        return data[missing:]

    def _begin(self, header: Header) -> None:
        if header.data_bytes > self._data_bytes_max:
            limit_bytes = self._data_bytes_max
            raise FrameError(f"a frame of {header.data_bytes} bytes; at most {limit_bytes} are taken here")
        self._header = header
        self._meta = memoryview(bytearray(header.meta_bytes))
        shared = header.flags & Flag.SHARED
        self._data = allocate(header.data_bytes) if header.data_bytes and not shared else None
        self._rest = [view for view in (self._meta, self._data) if view is not None and len(view)]
        if not self._rest:
            self._complete()

    def _take_body(self, data: memoryview) -> memoryview:
        place = self._rest[0]
        count = min(len(place), len(data))
        place[:count] = data[:count]
        self.filled(count)
        return data[count:]

    def _complete(self) -> None:
        header, self._header = self._header, None
        assert header is not None
        if header.flags & Flag.SHARED:
            self._data = self._shared(header.data_bytes)
        if (header.channel_id, header.channel_key) == (self._ends.own_id, self._ends.own_key):
            self.frames.append(_frame(header, bytes(self._meta), self._data))
        else:
            self.dropped_frames += 1
        self._data = None

    def _shared(self, size_bytes: int) -> memoryview:
        if not self._descriptors:
            raise FrameError("a frame announces shared data, and no descriptor came with it")
        descriptor = self._descriptors.popleft()
        try:
            return receive_shared(descriptor, size_bytes)
        finally:
            os.close(descriptor)


def _frame(header: Header, meta: bytes, data: memoryview | None) -> Frame:
    flags = header.flags & ~Flag.SHARED
    return Frame(
        header.channel_id, header.kind, header.call_id, header.function_id, flags, header.deadline_ns,
        header.credits, meta, data,
    )  # fmt: skip


def lost(channel_id: int, reason: str) -> Frame:
    """What a domain hands out when a channel's peer is gone."""
    return Frame(channel_id, Kind.LOST, 0, 0, 0, 0, 0, reason.encode(), None)


def _flat(buffer: Buffer) -> memoryview:
    view = memoryview(buffer)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.nbytes else memoryview(b"")


def _shared(buffers: list[memoryview], size_bytes: int) -> int:
    """A memfd with the data, or -1 when the kernel has no room or no memfd: then it goes by the stream."""
    try:
        return share(buffers, size_bytes)
    except OSError:
        return -1
