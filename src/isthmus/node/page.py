"""The lease page: 4 KiB of a file that an executor and its agent share.

The executor counts into it without a system call; the agent meters from it, and sets the deadline and the
draining flag. Because both map the file, the executor can fence itself when the agent is dead, and a
restarted agent finds everything it must know about a running executor here.

Invariant: each word has one writer. Words are 8-byte aligned, so a reader never sees half of one. Times are
CLOCK_MONOTONIC, which all processes of a machine share and which does not jump.

offset  words  field           writer
     0      1  magic           creator   b"isthmus1"
     8      1  deadline_ns     agent     the executor ends itself after this ...
    16      1  orphan_ns       agent     ... plus this while a client is connected
    24      1  draining        agent     1: admit no further calls
    64      1  pid             executor
    72      1  start_ticks     executor  field 22 of /proc/PID/stat: tells it from later users of its pid
    80      1  running         executor  1 while user code runs
    88      1  clients         executor  connected clients
    96      1  spin_ns         executor
   104      1  rows            executor  function rows in use
   112      1  exit_status     executor  0, or 1 + exit code of an exit in order
   120      1  threads         executor  threads that user code left behind
   192      1  cpu_ns          agent     CPU time of the dead executor, as its parent learnt it
   200      1  held            executor  actors and unfinished streams: what an idle executor would lose
   256     32  address         executor  where it listens; UTF-8, zero padded
   512  37x12  function rows   executor  calls, errors, busy_ns, last_call_ns, name (64 bytes, zero padded)
"""

import mmap
import os
from pathlib import Path
from typing import NamedTuple

from isthmus.core.errors import FrameError
from isthmus.fabric.channels import Meter

PAGE_BYTES = 4096
MAGIC = int.from_bytes(b"isthmus1", "little")

DEADLINE, ORPHAN, DRAINING = 1, 2, 3
PID, START_TICKS, RUNNING, CLIENTS, SPIN, ROWS, EXIT_STATUS, THREADS = range(8, 16)
CPU, HELD = 24, 25
_ADDRESS, _ADDRESS_BYTES = 256, 256
_ROWS_AT, _ROW_WORDS, _NAME_WORDS = 64, 12, 8
ROWS_MAX = (PAGE_BYTES // 8 - _ROWS_AT) // _ROW_WORDS

CALLS, ERRORS, BUSY, LAST = range(4)  # words of a row
OTHERS = "(others)"  # the last row counts every function that found no row of its own


class Row(NamedTuple):
    """Counters of one function."""

    name: str
    calls: int
    errors: int
    busy_ns: int
    last_call_ns: int


class Page:
    """One mapped page. `words` is the page as 512 unsigned 64-bit integers, for those who count calls."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Map the page at `path`. Raises OSError, and FrameError when the file is no page."""
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create:
                os.ftruncate(descriptor, PAGE_BYTES)
            if os.fstat(descriptor).st_size != PAGE_BYTES:
                raise FrameError(f"{path} is no lease page: {os.fstat(descriptor).st_size} bytes")
            self._map = mmap.mmap(descriptor, PAGE_BYTES)
        finally:
            os.close(descriptor)
        self.words = memoryview(self._map).cast("Q")
        if create:
            self.words[0] = MAGIC
        elif self.words[0] != MAGIC:
            raise FrameError(f"{path} is no lease page")

    def __getitem__(self, word: int) -> int:
        return self.words[word]

    def __setitem__(self, word: int, value: int) -> None:
        self.words[word] = value

    @property
    def address(self) -> str:
        return self._text(_ADDRESS, _ADDRESS_BYTES)

    @address.setter
    def address(self, value: str) -> None:
        self._put_text(_ADDRESS, _ADDRESS_BYTES, value)

    def add_row(self, name: str) -> int:
        """The first word of the row that counts this function. Rows are finite: late comers share the last
        one.
        """
        used = self.words[ROWS]
        for row in range(used):
            if self._name(row) == name:
                return _word(row)
        if used == ROWS_MAX:
            return _word(ROWS_MAX - 1)
        self._put_text(_word(used) * 8 + 32, _NAME_WORDS * 8, name if used < ROWS_MAX - 1 else OTHERS)
        self.words[ROWS] = used + 1
        return _word(used)

    def meter(self, row: int) -> Meter:
        """For a function that runs without Python."""
        return Meter(self.words[row : row + 4], self.words[RUNNING : RUNNING + 1])

    def rows(self) -> list[Row]:
        used = min(self.words[ROWS], ROWS_MAX)
        return [Row(self._name(row), *self.words[_word(row) : _word(row) + 4]) for row in range(used)]

    def detach(self) -> None:
        """Go on with a private copy: what a forked child counts must not reach the page."""
        self.words = memoryview(bytearray(self._map)).cast("Q")

    def close(self) -> None:
        self.words.release()
        self._map.close()

    def _name(self, row: int) -> str:
        return self._text(_word(row) * 8 + 32, _NAME_WORDS * 8)

    def _text(self, offset: int, size_bytes: int) -> str:
        return self._map[offset : offset + size_bytes].rstrip(b"\0").decode("utf-8", "replace")

    def _put_text(self, offset: int, size_bytes: int, text: str) -> None:
        data = text.encode()[: size_bytes - 1].decode("utf-8", "ignore").encode()
        self._map[offset : offset + size_bytes] = data.ljust(size_bytes, b"\0")


def _word(row: int) -> int:
    return _ROWS_AT + row * _ROW_WORDS
