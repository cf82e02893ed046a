"""Memory of received data, and how it passes between processes of one host without a second copy.

The sender writes large data into a memfd and seals it: from then on nobody can change or shrink it, so that a
receiver that maps it can neither be surprised nor killed by SIGBUS. The mapping is private: what the receiver
writes into it stays its own. Source: memfd_create(2), fcntl(2) on file seals."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence

from isthmus.core.errors import FrameError

SHARED_BYTES_MIN = 256 * 1024  # below it, a copy through the socket is cheaper than making and mapping a file
LAZY_BYTES_MIN = 1024 * 1024  # from here on fresh pages are mapped as they fill, not zeroed in advance
IOVECS_MAX = 1024  # UIO_MAXIOV
_SEALS = (
    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x0008
)  # F_SEAL_WRITE, not named in 3.11
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def allocate(size_bytes: int) -> memoryview:
    """Writable memory that lives as long as a view on it. Raises FrameError when there is not enough."""
    try:
        if size_bytes >= LAZY_BYTES_MIN:
            return memoryview(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return memoryview(bytearray(size_bytes))
    except (OSError, MemoryError, OverflowError) as error:
        raise FrameError(f"no memory for a frame of {size_bytes} bytes: {error}") from error


def share(buffers: Sequence[memoryview], size_bytes: int) -> int:
    """Descriptor of a sealed memfd with the buffers one after the other. Raises OSError; then stream them."""
    descriptor = os.memfd_create("isthmus-frame", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        _write_all(descriptor, buffers)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def receive_shared(descriptor: int, size_bytes: int) -> memoryview:
    """The memfd's content, mapped; the descriptor stays the caller's. Raises FrameError if unsealed."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        present_bytes = os.fstat(descriptor).st_size
    except OSError as error:
        raise FrameError(f"the peer sent a descriptor that is no memfd: {error}") from error
    if seals & _SEALS != _SEALS or present_bytes != size_bytes or size_bytes == 0:
        raise FrameError(
            f"shared data has {present_bytes} bytes and seals {seals}; {size_bytes} and {_SEALS} needed"
        )
    block = allocate(max(size_bytes, LAZY_BYTES_MIN))[:size_bytes]
    if not _map_over(block, descriptor):
        os.preadv(descriptor, [block], 0)
    return block


def _write_all(descriptor: int, buffers: Sequence[memoryview]) -> None:
    rest = list(buffers)
    while rest:
        written = os.writev(descriptor, rest[:IOVECS_MAX])
        if written == 0:
            raise OSError(errno.ENOSPC, "a memfd takes no more bytes")
        rest = advance(rest, written)


def advance(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The buffers without their first `count` bytes."""
    for index, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[index + 1 :]]
        count -= len(buffer)
    return []


def _map_over(block: memoryview, descriptor: int) -> bool:
    """Put the file in the place of the anonymous pages of `block`, whose owner unmaps them in the end.

    mmap.mmap on the descriptor itself would keep a duplicate of it open as long as the data lives.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    flags = mmap.MAP_PRIVATE | _MAP_FIXED | mmap.MAP_POPULATE
    mapped = _libc.mmap(address, len(block), mmap.PROT_READ, flags, descriptor, 0)
    if mapped == _MAP_FAILED:
        return False
    # only now writable: to populate a writable private mapping would copy every page
    return bool(_libc.mprotect(address, len(block), mmap.PROT_READ | mmap.PROT_WRITE) == 0)
