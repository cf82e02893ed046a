"""The far side of `isthmus.Memory`: blocks of bytes in an executor that does nothing but hold them.

Invariant: a freed block's pages go back to the system once nothing reads them any more.
Not here: what fits, and whether an offset is inside a block; the one client that there is knows it
(`memory.py`).
"""

import mmap


class Blocks:
    """An actor. Anonymous mappings, because the system gives them zeroed and only as they are touched."""

    def __init__(self) -> None:
        self._blocks: dict[int, mmap.mmap] = {}

    def allocate(self, number: int, size_bytes: int) -> None:
        self._blocks[number] = mmap.mmap(-1, size_bytes)

    def put(self, number: int, offset: int, data: bytes | memoryview) -> None:
        self._blocks[number][offset : offset + len(data)] = data

    def get(self, number: int, offset: int, size_bytes: int) -> memoryview:
        """A view: it is sent from where it lies. The next call begins when it has left."""
        return memoryview(self._blocks[number])[offset : offset + size_bytes]

    def free(self, number: int) -> None:
        del self._blocks[number]
