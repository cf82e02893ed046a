"""A group of ranks that talk to each other: messages and collectives on NumPy arrays and small Python values.

Every message is a PEER frame: `function_id` is its tag, `call_id` names the group (upper half) and the
sequence number (lower half). Collectives are numbered alike on all ranks, so that a late frame of an earlier
one is never taken for a current one. The lower rank of two opens their channel when either first needs it,
and says so by a frame: if both connected at once, each would wait for the other's answer.

Algorithms by size, as in Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in
MPICH (2005): binomial trees, recursive doubling for short and a ring for long reductions.

Invariant: a rank that waits for a dead one raises PeerLostError naming it, and tells the others, who raise
too.
Not here: who is in the group (`isthmus.sdk.groups`), and frames that are not the group's (`stray`)."""

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from isthmus.core.errors import CallTimeoutError, FabricError, InvalidRequestError, PeerLostError
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.codec import GroupTable, decode_value, encode_value
from isthmus.fabric.frames import Hello, Kind

RING_BYTES_MIN = (
    64 * 1024
)  # longer arrays are reduced around a ring: each rank sends 2 (n-1)/n of them, not log n
TAGS_MAX = 2**31  # tags of `send` are below it
PENDING_MAX = 65536  # messages nobody has asked for yet
_GREETING, _ABORT, _COLLECTIVE = (
    TAGS_MAX,
    TAGS_MAX + 1,
    TAGS_MAX + 2,
)  # from the last on: the steps of collectives
_SPIN_S = 0.0005
_POLL_S = 1.0
_FULL_S = 0.001
_CONNECT_S = 5.0

Operation = str | Callable[[Any, Any], Any]


class Group:
    """One rank's view of its group. All ranks must call the same collectives in the same order.

    timeout_s  how long one operation may wait for another rank
    stray      gets the frames that are not for this group; without it they are dropped
    """

    def __init__(
        self, domain: Domain, table: GroupTable, timeout_s: float = 300.0,
        stray: Callable[[Frame], None] | None = None,
    ) -> None:  # fmt: skip
        self.rank = table.rank
        self.size = len(table.peers)
        self.timeout_s = timeout_s
        self._domain = domain
        self._peers = table.peers
        self._stray = stray
        self._name = zlib.crc32(table.group.encode()) << 32
        self._channels: dict[int, Channel] = {}
        self._own: list[Channel] = []  # the ones this side opened, and closes
        self._ranks: dict[int, int] = {}  # by channel id
        self._lost: dict[int, str] = {}  # why, by rank
        self._aborted = ""
        self._pending: dict[tuple[int, int, int], Frame] = {}  # by source, tag and number
        self._sent: dict[tuple[int, int], int] = {}  # messages so far, by target and tag
        self._taken: dict[tuple[int, int], int] = {}  # by source and tag
        self._operation = 0

    # messages -----------------------------------------------------------------------------------------------
    def send(self, value: Any, target: int, tag: int = 0) -> None:
        """Returns when the message is on its way; `value` may change afterwards. Raises PeerLostError."""
        self._check(target, tag)
        number = self._sent.get((target, tag), 0)
        self._sent[target, tag] = number + 1
        self._post(target, tag, number, value)

    def recv(self, source: int, tag: int = 0) -> Any:
        """The next message from `source` with this tag. Raises PeerLostError or CallTimeoutError."""
        self._check(source, tag)
        number = self._taken.get((source, tag), 0)
        value = self._take(source, tag, number)
        self._taken[source, tag] = number + 1
        return value

    # collectives --------------------------------------------------------------------------------------------
    def barrier(self) -> None:
        """Return when every rank has come here. Dissemination: log2(size) rounds."""
        operation = self._begin()
        for step, distance in enumerate(_powers(self.size)):
            self._post((self.rank + distance) % self.size, _COLLECTIVE + step, operation, None)
            self._take((self.rank - distance) % self.size, _COLLECTIVE + step, operation)

    def broadcast(self, value: Any = None, root: int = 0) -> Any:
        """The root's value, on every rank. Binomial tree."""
        self._check(root)
        return self._spread(self._begin(), value, root)

    def reduce(self, value: Any, operation: Operation = "sum", root: int = 0) -> Any:
        """All values combined, on the root; None elsewhere. Binomial tree.

        operation  "sum", "prod", "min", "max" or an associative, commutative function of two values
        """
        self._check(root)
        number, combine = self._begin(), _combiner(operation)
        place = (self.rank - root) % self.size
        for distance in _powers(self.size):
            if place & distance:
                self._post((self.rank - distance) % self.size, _COLLECTIVE, number, value)
                return None
            if place + distance < self.size:
                value = combine(value, self._take((self.rank + distance) % self.size, _COLLECTIVE, number))
        return value

    def allreduce(self, value: Any, operation: Operation = "sum") -> Any:
        """All values combined, on every rank, bit for bit the same; arrays element by element."""
        if _ring_pays(value, self.size) and isinstance(operation, str):
            return self._ring(value, _combiner(operation))
        return self._double(value, _combiner(operation))

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        """The values by rank, on the root; None elsewhere."""
        self._check(root)
        number = self._begin()
        if self.rank != root:
            self._post(root, _COLLECTIVE, number, value)
            return None
        return [value if rank == root else self._take(rank, _COLLECTIVE, number) for rank in range(self.size)]

    def allgather(self, value: Any) -> list[Any]:
        """The values by rank, on every rank. Ring."""
        number = self._begin()
        values = [value] * self.size
        for step in range(self.size - 1):
            self._post(self._next, _COLLECTIVE + step, number, values[(self.rank - step) % self.size])
            values[(self.rank - step - 1) % self.size] = self._take(
                self._previous, _COLLECTIVE + step, number
            )
        return values

    def scatter(self, values: Sequence[Any] | None = None, root: int = 0) -> Any:
        """values[rank] of the root's. Raises InvalidRequestError there without one value for each rank."""
        self._check(root)
        number = self._begin()
        if self.rank != root:
            return self._take(root, _COLLECTIVE, number)
        values = self._one_each(values)
        for rank in range(self.size):
            if rank != root:
                self._post(rank, _COLLECTIVE, number, values[rank])
        return values[root]

    def all_to_all(self, values: Sequence[Any]) -> list[Any]:
        """What every rank has for this one: the result's [i] is values[rank] of rank i."""
        number = self._begin()
        values = self._one_each(values)
        results = list(values)
        for distance in range(1, self.size):
            target, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
            self._post(target, _COLLECTIVE, number, values[target])
            results[source] = self._take(source, _COLLECTIVE, number)
        return results

    def close(self) -> None:
        """Close the channels that this rank opened. Idempotent."""
        for channel in self._own:
            channel.close()
        self._own.clear()
        self._channels.clear()
        self._pending.clear()

    # how collectives go -------------------------------------------------------------------------------------
    @property
    def _next(self) -> int:
        return (self.rank + 1) % self.size

    @property
    def _previous(self) -> int:
        return (self.rank - 1) % self.size

    def _begin(self) -> int:
        self._operation += 1
        return self._operation

    def _spread(self, number: int, value: Any, root: int) -> Any:
        place = (self.rank - root) % self.size
        distances = _powers(self.size)
        for distance in distances:
            if place & distance:
                value = self._take((self.rank - distance) % self.size, _COLLECTIVE, number)
                distances = _powers(distance)
                break
        for distance in reversed(distances):
            if place + distance < self.size:
                self._post((self.rank + distance) % self.size, _COLLECTIVE, number, value)
        return value

    def _double(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Recursive doubling in the largest power of two; ranks beyond it fold in before and out after."""
        number = self._begin()
        core = 1 << (self.size.bit_length() - 1)
        if self.rank >= core:
            self._post(self.rank - core, _COLLECTIVE, number, value)
            return self._take(self.rank - core, _COLLECTIVE + 1, number)
        extra = self.rank + core
        if extra < self.size:
            value = combine(value, self._take(extra, _COLLECTIVE, number))
        for step, distance in enumerate(_powers(core), start=2):
            partner = self.rank ^ distance
            self._post(partner, _COLLECTIVE + step, number, value)
            other = self._take(partner, _COLLECTIVE + step, number)
            value = combine(value, other) if self.rank < partner else combine(other, value)
        if extra < self.size:
            self._post(extra, _COLLECTIVE + 1, number, value)
        return value

    def _ring(self, array: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Reduce-scatter and allgather around a ring of `size` blocks."""
        import numpy

        number = self._begin()
        blocks = numpy.array_split(array.reshape(-1).copy(), self.size)
        for step in range(self.size - 1):
            sent, taken = (self.rank - step) % self.size, (self.rank - step - 1) % self.size
            self._post(self._next, _COLLECTIVE + step, number, blocks[sent])
            blocks[taken] = combine(self._take(self._previous, _COLLECTIVE + step, number), blocks[taken])
        for step in range(self.size - 1):
            sent, taken = (self.rank + 1 - step) % self.size, (self.rank - step) % self.size
            tag = _COLLECTIVE + self.size + step
            self._post(self._next, tag, number, blocks[sent])
            blocks[taken] = self._take(self._previous, tag, number)
        return numpy.concatenate(blocks).reshape(array.shape)

    def _one_each(self, values: Sequence[Any] | None) -> Sequence[Any]:
        if values is None or len(values) != self.size:
            raise InvalidRequestError(f"need one value for each of {self.size} ranks, got {values!r:.80}")
        return values

    # how messages go ----------------------------------------------------------------------------------------
    def _check(self, rank: int, tag: int = 0) -> None:
        if not 0 <= rank < self.size or not 0 <= tag < TAGS_MAX:
            raise InvalidRequestError(f"rank {rank} of {self.size} or tag {tag} does not exist")

    def _post(self, target: int, tag: int, number: int, value: Any) -> None:
        meta, data = encode_value(value)
        copies = tuple(bytes(part) for part in data)  # the caller may change its arrays as soon as we return
        if target == self.rank:
            frame = Frame(0, Kind.PEER, number, tag, 0, 0, 0, meta, memoryview(bytearray(b"".join(copies))))
            self._pending[target, tag, number] = frame
            return
        channel = self._channel(target)
        deadline_s = time.monotonic() + self.timeout_s
        try:
            while not channel.send(Kind.PEER, self._name | number, tag, meta, copies):
                self._progress(deadline_s, f"rank {target} takes no more messages", _FULL_S)
        except PeerLostError as error:
            if not self._aborted:
                self._lost[target] = str(error)
            self._fail(target)

    def _take(self, source: int, tag: int, number: int) -> Any:
        key = source, tag, number
        if source != self.rank and key not in self._pending:
            deadline_s = time.monotonic() + self.timeout_s
            self._channel(source)
            while key not in self._pending:
                if source in self._lost:
                    self._fail(source)
                self._progress(deadline_s, f"nothing came from rank {source}", _POLL_S)
        if key not in self._pending:
            raise InvalidRequestError(f"rank {self.rank} waits for a message that it has not sent to itself")
        frame = self._pending.pop(key)
        return decode_value(frame.meta, frame.data)

    def _channel(self, rank: int) -> Channel:
        """The one channel to this rank, opened now if need be. Raises PeerLostError or CallTimeoutError."""
        deadline_s = time.monotonic() + self.timeout_s
        while rank not in self._channels:
            if rank in self._lost:
                self._fail(rank)
            if self.rank < rank:
                self._connect(rank)
            else:
                self._progress(deadline_s, f"rank {rank} has not connected", _POLL_S)
        return self._channels[rank]

    def _connect(self, rank: int) -> None:
        address, token = self._peers[rank]
        hello = Hello(
            token=token, python=python_version(), isthmus=ISTHMUS_VERSION, role="peer", rank=self.rank
        )
        try:
            channel = self._domain.connect(address, hello, min(self.timeout_s, _CONNECT_S))
            self._own.append(channel)
            self._enter(rank, channel)
            channel.send(Kind.PEER, self._name, _GREETING, b"")
        except FabricError as error:
            self._lost[rank] = str(error)
            self._fail(rank)

    def _enter(self, rank: int, channel: Channel) -> None:
        self._channels[rank] = channel
        self._ranks[channel.id] = rank

    def _progress(self, deadline_s: float, what: str, wait_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise CallTimeoutError(f"{what} within {self.timeout_s} s, seen from rank {self.rank}")
        frame = self._domain.poll(min(left_s, wait_s), _SPIN_S)
        if frame is not None:
            self._sort(frame)
        if self._aborted:
            raise PeerLostError(self._aborted)

    def _sort(self, frame: Frame) -> None:
        if frame.kind == Kind.LOST and frame.channel_id in self._ranks:
            self._lost.setdefault(self._ranks[frame.channel_id], frame.meta.decode("utf-8", "replace"))
        elif frame.kind == Kind.PEER and frame.call_id >> 32 == self._name >> 32:
            self._file(frame)
        elif self._stray is not None:
            self._stray(frame)

    def _file(self, frame: Frame) -> None:
        source = self._source(frame.channel_id)
        if source is None or frame.function_id == _GREETING:
            return
        if frame.function_id == _ABORT:
            self._aborted = frame.meta.decode("utf-8", "replace")
            self._tell(self._aborted)
            return
        if len(self._pending) >= PENDING_MAX:
            raise FabricError(f"{PENDING_MAX} messages wait in rank {self.rank} that it does not receive")
        self._pending[source, frame.function_id, frame.call_id & 0xFFFFFFFF] = frame

    def _source(self, channel_id: int) -> int | None:
        """The rank at the other end; a channel that it opened is ours from its first frame on."""
        if channel_id not in self._ranks:
            channel = self._domain.channel(channel_id)
            hello = None if channel is None else channel.peer
            if channel is None or not isinstance(hello, Hello) or not 0 <= hello.rank < self.size:
                return None
            self._enter(hello.rank, channel)
        return self._ranks[channel_id]

    def _fail(self, rank: int) -> None:
        """Raises PeerLostError, here and on every rank that this one has a channel to."""
        words = (
            self._aborted or f"rank {rank} of the group is lost: {self._lost.get(rank, 'its channel broke')}"
        )
        if not self._aborted:
            self._aborted = words
            self._tell(words)
        raise PeerLostError(words)

    def _tell(self, words: str) -> None:
        for rank, channel in self._channels.items():
            if rank not in self._lost and channel.alive:
                try:
                    channel.send(Kind.PEER, self._name, _ABORT, words.encode())
                except PeerLostError:
                    continue  # it learns of its own end by other means


def _powers(limit: int) -> list[int]:
    """1, 2, 4, ... below `limit`."""
    return [1 << bit for bit in range((limit - 1).bit_length())] if limit > 1 else []


def _ring_pays(value: Any, size: int) -> bool:
    return size > 2 and getattr(value, "nbytes", 0) >= RING_BYTES_MIN and hasattr(value, "reshape")


def _combiner(operation: Operation) -> Callable[[Any, Any], Any]:
    if callable(operation):
        return operation
    if operation not in _COMBINERS:
        raise InvalidRequestError(f"no reduction {operation!r}; choose {', '.join(_COMBINERS)} or a function")
    return _COMBINERS[operation]


def _lesser(one: Any, other: Any) -> Any:
    return _elementwise("minimum", one, other) if hasattr(one, "dtype") else min(one, other)


def _greater(one: Any, other: Any) -> Any:
    return _elementwise("maximum", one, other) if hasattr(one, "dtype") else max(one, other)


def _elementwise(name: str, one: Any, other: Any) -> Any:
    import numpy

    return getattr(numpy, name)(one, other)


_COMBINERS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda one, other: one + other,
    "prod": lambda one, other: one * other,
    "min": _lesser,
    "max": _greater,
}
