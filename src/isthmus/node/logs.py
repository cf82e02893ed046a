"""The captured output of a lease: one file that executors append to, cut at its head when it grows too long.

Offsets count from the first byte ever written, also after a cut: the head is punched out of the file (its
blocks are freed, its length stays), where the file system can do that; elsewhere the file starts anew with
the newest output.
"""

import ctypes
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_BLOCK_BYTES = 4096


class Chunk(NamedTuple):
    text: str
    next_offset: int


class Log:
    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._base = _hole_bytes(path)  # bytes before it are gone

    def read(self, offset: int, limit_bytes: int) -> Chunk:
        """Text from `offset` on, or from the oldest byte kept; whole characters only."""
        try:
            with self._path.open("rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                offset = min(max(offset, self._base), size_bytes)
                file.seek(offset)
                data = file.read(limit_bytes)
        except FileNotFoundError:
            return Chunk("", offset)
        whole = _whole_characters(data)
        return Chunk(data[:whole].decode("utf-8", "replace"), offset + whole)

    def trim(self) -> None:
        """Drop the oldest output beyond the limit."""
        try:
            size_bytes = self._path.stat().st_size
        except FileNotFoundError:
            return
        if size_bytes - self._base <= self._bytes_max:
            return
        base = (size_bytes - self._bytes_max // 2) // _BLOCK_BYTES * _BLOCK_BYTES
        with self._path.open("a+b") as file:  # executors append meanwhile
            if _punch(file.fileno(), base):
                self._base = base
            else:
                _start_anew(file, base)
                self._base = 0


def _whole_characters(data: bytes) -> int:
    """Length of `data` without a character cut off at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        need = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) if need <= back else (len(data) - back or len(data))
    return len(data)


def _start_anew(file: BinaryIO, base: int) -> None:
    file.seek(base)
    newest = file.read()
    file.truncate(0)
    file.seek(0)
    file.write(newest)


def _hole_bytes(path: Path) -> int:
    """How much an earlier agent has punched out at the head; 0 where the file system does not tell."""
    try:
        with path.open("rb") as file:
            return os.lseek(file.fileno(), 0, os.SEEK_DATA)
    except OSError:  # no file yet, nothing in it, not known here
        return 0


def _punch(descriptor: int, size_bytes: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return bool(libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, 0, size_bytes) == 0)
