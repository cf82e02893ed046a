"""Memory of other nodes, under a lease: allocate blocks, put bytes into them, get bytes out of them.

Invariants: what an acknowledged `put` wrote is what the next `get` gives, until the lease ends; then every
operation raises what ended it. Nothing is written to disk.
Not here: where the bytes lie (`blocks.py`), how they travel: as the data of calls, by shared memory on one
node and by rendezvous, which is remote memory access, over RDMA (`fabric`).
"""

import contextlib
import itertools
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

from isthmus.core.errors import CallError, EvictedError, LeaseEndedError, NoCapacityError
from isthmus.core.model import LeaseClass, Resources
from isthmus.core.units import format_bytes, parse_bytes
from isthmus.sdk.actors import Actor
from isthmus.sdk.blocks import Blocks
from isthmus.sdk.engine import Engine
from isthmus.sdk.function import FunctionSpec
from isthmus.sdk.futures import Future
from isthmus.sdk.plans import Plans

T = TypeVar("T")

HOLDER_BYTES = 96 << 20  # what the interpreter that holds the blocks takes, and PIECES of what is in flight
PIECE_BYTES = 4 << 20  # larger transfers are cut, so that the holder needs no second copy of them
PIECES = 4  # of one transfer under way


class Memory:
    """A lease on memory: `with site.memory("8GiB") as memory: block = memory.allocate("64MiB")`.

    size_bytes  what may be allocated in all
    free_bytes  what is not allocated now
    """

    def __init__(
        self, engine: Engine, plans: Plans, size: str | int, lease_class: LeaseClass, policy: str
    ) -> None:
        """Returns when the lease is granted. Raises ValueError for a size that is none, or as `site.call`."""
        self.size_bytes = _some_bytes(size)
        resources = Resources(memory=self.size_bytes + HOLDER_BYTES)
        spec = FunctionSpec(resources=resources, lease_class=lease_class, policy=policy)
        self._lock = threading.Lock()
        self._allocated_bytes = 0
        self._numbers = itertools.count(1)
        self._collected: deque[tuple[int, int]] = deque()  # not yet freed: a finalizer takes no lock
        self._actor = Actor(engine, plans, Blocks, ((), {}), spec)

    @property
    def closed(self) -> bool:
        return not self._actor._dropped.alive

    @property
    def free_bytes(self) -> int:
        self._free_dropped()
        return self.size_bytes - self._allocated_bytes

    def allocate(self, size: str | int) -> "Block":
        """A block of zeros. Raises NoCapacityError when less than that is free."""
        size_bytes = _some_bytes(size)
        self._free_dropped()
        self._reserve(size_bytes)
        number = next(self._numbers)
        try:
            self._actor.allocate.call(number, size_bytes)
        except BaseException:
            self._reserve(-size_bytes)
            raise
        return Block(self, number, size_bytes)

    def close(self) -> None:
        """Give the lease back, and with it all blocks. Idempotent."""
        self._actor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reserve(self, size_bytes: int) -> None:
        with self._lock:
            free_bytes = self.size_bytes - self._allocated_bytes
            if size_bytes > free_bytes:
                raise NoCapacityError(
                    f"a block of {format_bytes(size_bytes)} does not fit: {format_bytes(free_bytes)} of "
                    f"{format_bytes(self.size_bytes)} are free; free other blocks, or open a larger memory"
                )
            self._allocated_bytes += size_bytes

    def _free(self, number: int, size_bytes: int) -> Future[None]:
        """The bytes count as free at once: whatever is allocated next comes after it at the holder."""
        future: Future[None] = self._actor.free(number)
        self._reserve(-size_bytes)
        return future

    def _free_dropped(self) -> None:
        while True:
            try:
                number, size_bytes = self._collected.popleft()
            except IndexError:
                return
            self._free(number, size_bytes)


class Block:
    """Bytes in leased memory. Every operation raises EvictedError or another error of the lease once it has
    ended, LookupError after `free`, ValueError for what lies outside the block.
    """

    def __init__(self, memory: Memory, number: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._memory = memory
        self._number = number
        self._dropped = weakref.finalize(self, memory._collected.append, (number, size_bytes))
        self._dropped.atexit = False

    def put(self, data: Any, offset: int = 0) -> None:
        """Copy a contiguous buffer (bytes, a memoryview, a NumPy array) to `offset`, its bytes as they lie in
        memory here. Then it is there. Raises BufferError for a buffer with gaps.
        """
        view = pickle.PickleBuffer(data).raw()
        self._check(offset, len(view))
        for piece in self._pieces(len(view), lambda at, end: self._put(offset + at, view[at:end])):
            piece[1].result()

    def get(self, offset: int = 0, size_bytes: int | None = None) -> memoryview:
        """A copy of `size_bytes` bytes from `offset` on (None: up to the end); `np.frombuffer` reads it."""
        wanted_bytes = self.size_bytes - offset if size_bytes is None else size_bytes
        self._check(offset, wanted_bytes)
        if wanted_bytes <= PIECE_BYTES:
            return self._get(offset, wanted_bytes).result()
        copy = memoryview(bytearray(wanted_bytes))
        for at, piece in self._pieces(wanted_bytes, lambda at, end: self._get(offset + at, end - at)):
            received = piece.result()
            copy[at : at + len(received)] = received
        return copy

    def free(self) -> None:
        """Give these bytes back to the memory. A block that is dropped is freed, too. Idempotent."""
        if self._dropped.detach() is not None and not self._memory.closed:
            with contextlib.suppress(CallError, EvictedError):  # the lease has ended: they are free already
                self._memory._free(self._number, self.size_bytes).result()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a block belongs to the client that allocated it; send what `get` gives instead")

    def _put(self, offset: int, data: memoryview) -> Future[None]:
        future: Future[None] = self._memory._actor.put(self._number, offset, data)
        return future

    def _get(self, offset: int, size_bytes: int) -> Future[memoryview]:
        future: Future[memoryview] = self._memory._actor.get(self._number, offset, size_bytes)
        return future

    def _pieces(
        self, size_bytes: int, start: Callable[[int, int], Future[T]]
    ) -> Iterator[tuple[int, Future[T]]]:
        """Start a transfer piece by piece, a few ahead; gives each piece's place and future, in order."""
        under_way: deque[tuple[int, Future[T]]] = deque()
        for at in range(0, size_bytes, PIECE_BYTES):
            if len(under_way) == PIECES:
                yield under_way.popleft()
            under_way.append((at, start(at, min(at + PIECE_BYTES, size_bytes))))
        yield from under_way

    def _check(self, offset: int, size_bytes: int) -> None:
        if not self._dropped.alive:
            raise LookupError("this block was freed")
        if self._memory.closed:
            raise LeaseEndedError("this memory was closed, and its blocks went with it; open another one")
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise ValueError(
                f"bytes {offset} to {offset + size_bytes} are outside a block of {self.size_bytes} bytes"
            )


def _some_bytes(size: str | int) -> int:
    size_bytes = parse_bytes(size)
    if size_bytes < 1:
        raise ValueError(f"memory has at least one byte, not {size!r}")
    return size_bytes
