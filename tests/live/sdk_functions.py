"""What the sdk's live tests run on executors. Apart from the tests, so that executors need not import
pytest.
"""

import asyncio
import errno
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np

import isthmus


def square(number: int) -> int:
    return number * number


def same(value: object) -> object:
    return value


def length(data: bytes) -> int:
    return len(data)


def nap(duration_s: float) -> float:
    time.sleep(duration_s)
    return duration_s


def refuse_thirds(number: int) -> int:
    if number % 3 == 0:
        raise ValueError(f"{number} is a multiple of three")
    return number


def count_up(path: str) -> int:
    """How often it was called with this path, this call included."""
    with open(path, "a") as file:
        file.write(".")
    return os.path.getsize(path)


@isthmus.function(retries=isthmus.Retry(max=3, backoff_s=0.01, on=(ConnectionError,)))
def succeed_at_third(path: str) -> int:
    calls = count_up(path)
    if calls < 3:
        raise ConnectionError("not yet")
    return calls


@isthmus.function(isthmus.Resources(cores=1, memory="256MiB"), timeout_s=0.2)
def overrun() -> None:
    time.sleep(60)


def ignore_interruption(path: str) -> None:
    """Swallows what asks it to stop; only killing its process ends it."""
    Path(path).touch()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue


def leave_when_interrupted(path: str) -> None:
    Path(path + ".begun").touch()
    try:
        time.sleep(60)
    finally:
        Path(path).touch()


def process_id() -> int:
    return os.getpid()


@isthmus.function(isthmus.Resources(memory="300MiB"))  # a lease without others' nested executors
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@isthmus.function(isthmus.Resources(memory="300MiB"))
def quit_with(code: int) -> None:
    os._exit(code)


def leave() -> None:
    sys.exit(3)


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


def endless(path: str) -> Iterator[int]:
    try:
        number = 0
        while True:
            yield number
            number += 1
    finally:
        Path(path).touch()


def break_after(count: int) -> Iterator[int]:
    yield from range(count)
    raise ValueError("no more")


async def slow_numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        await asyncio.sleep(0)
        yield number


async def later(value: int) -> int:
    await asyncio.sleep(0.001)
    return value


def call_nested(number: int) -> int:
    return isthmus.current_site().call(square, number)


def call_deeper(depth: int) -> int:
    return 0 if depth == 0 else 1 + isthmus.current_site().call(call_deeper, depth - 1)


def write_later(path: str, duration_s: float) -> None:
    time.sleep(duration_s)
    Path(path).write_text("apple")


@isthmus.actor
class Counter:
    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise ValueError("starts below zero")
        self.count = start
        self.log: list[str] = []

    @isthmus.enter
    def begin(self) -> None:
        self.log.append("entered")

    @isthmus.exit
    def end(self) -> None:
        if len(self.log) > 1:
            Path(self.log[1]).touch()

    def add(self, number: int) -> int:
        self.count += number
        return self.count

    def leave_mark(self, path: str) -> list[str]:
        self.log.append(path)
        return self.log

    def upto(self) -> Iterator[int]:
        yield from range(self.count)

    def die(self) -> None:
        os._exit(4)


def sum_of_ranks(context: isthmus.Context, array: np.ndarray) -> tuple[int, float]:
    total = context.allreduce(array)
    context.barrier()
    return context.rank, float(total.sum())


def fail_at_first_rank(context: isthmus.Context) -> None:
    if context.rank == 0:
        raise ValueError("rank 0 gives up")
    context.recv(0)


def sum_in_parallel(count: int) -> int:
    from joblib import Parallel, delayed

    return sum(Parallel(n_jobs=2)(delayed(square)(number) for number in range(count)))


def fill(directory: Path, size_bytes: int) -> int:
    """How much of it could be written there."""
    with (directory / "filling").open("wb", buffering=0) as file:
        try:
            for _ in range(size_bytes // 2**20):
                file.write(bytes(2**20))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        return file.tell()


@isthmus.function(isthmus.Resources(memory="256MiB", cache="64MiB"))
def fill_cache(size_bytes: int) -> tuple[str, int]:
    """Where the cache is, and how much of it could be written."""
    directory = Path(os.environ["ISTHMUS_CACHE"])
    return str(directory), fill(directory, size_bytes)
