"""Functions that exit, crash, fork, leak and resist: each ends in the right typed error and harms nobody."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import isthmus
from tests.faults import census, doors
from tests.faults.conftest import Leaks

SOON_S = 10.0
GOING_S = 5.0


def add(left: int, right: int) -> int:
    return left + right


def exit_in_order() -> None:
    sys.exit(3)


def exit_at_once() -> None:
    os._exit(4)


def segfault() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.abort()


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (exit_in_order, "exit code 3"),
        (exit_at_once, "exit code 4"),
        (segfault, "SIGSEGV"),
        (abort, "SIGABRT"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_function_that_ends_its_process_is_named(
    site: isthmus.Site, fn: Callable[[], None], words: str
) -> None:
    with pytest.raises(isthmus.ExecutorLostError, match=words):
        site.submit(fn).result(timeout_s=SOON_S)
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3


def nested_segfault() -> str:
    """One of several executors of a lease dies: the nested call's."""
    with pytest.raises(isthmus.ExecutorLostError) as lost:
        isthmus.current_site().submit(segfault).result(timeout_s=SOON_S)
    return str(lost.value)


def test_the_end_of_one_executor_of_several_is_named(site: isthmus.Site) -> None:
    assert "SIGSEGV" in site.submit(nested_segfault).result(timeout_s=2 * SOON_S)


def fork_and_return(mark: str) -> int:
    """The child tries to live on and to return from the function a second time."""
    if os.fork() == 0:
        Path(mark).write_text(str(os.getpid()))
        return -1
    return os.getpid()


def fork_and_stay() -> int:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return child


def test_a_forked_child_does_not_answer_for_its_parent(site: isthmus.Site, tmp_path: Path) -> None:
    answers = [site.call(fork_and_return, str(tmp_path / f"mark{n}")) for n in range(3)]
    assert all(answer > 0 for answer in answers)
    assert site.call(add, 1, 2) == 3
    children = [int(path.read_text()) for path in tmp_path.glob("mark*")]
    for child in children:
        census.wait_until(lambda child=child: census.is_gone(child), SOON_S, "the forked child ended")


def test_what_a_function_forked_ends_with_its_lease(site: isthmus.Site) -> None:
    child = site.call(fork_and_stay)
    assert not census.is_gone(child)
    site.close()
    census.wait_until(lambda: census.is_gone(child), SOON_S, "the forked child ended")


def leak_threads(count: int) -> int:
    for _ in range(count):
        threading.Thread(target=time.sleep, args=(600,)).start()
    return threading.active_count()


def test_leaked_threads_do_not_hold_calls_or_the_end(site: isthmus.Site) -> None:
    assert site.call(leak_threads, 20) > 20
    assert site.call(add, 1, 2) == 3
    start_s = time.monotonic()
    site.close()
    assert time.monotonic() - start_s < GOING_S


@isthmus.function(isthmus.Resources(memory="256MiB"))
def eat_memory() -> int:
    eaten = []
    while True:
        eaten.append(b"x" * 2**24)


def test_a_function_over_its_memory_fails_alone(site: isthmus.Site) -> None:
    other = site.submit(time.sleep, 1.0)
    with pytest.raises((isthmus.MemoryLimitError, MemoryError)):
        site.submit(eat_memory).result(timeout_s=3 * SOON_S)
    assert other.result(timeout_s=SOON_S) is None
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3


@isthmus.function(timeout_s=0.5)
def resist(mark: str) -> None:
    """Ignore SIGTERM and swallow every exception."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(mark).write_text(str(os.getpid()))
    until_s = time.monotonic() + 600
    while time.monotonic() < until_s:
        try:
            time.sleep(600)
        except BaseException:
            continue


def test_a_function_that_resists_every_interruption_is_killed(site: isthmus.Site, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(isthmus.CallTimeoutError):
        site.submit(resist, str(mark)).result(timeout_s=SOON_S)
    pid = int(mark.read_text())
    census.wait_until(lambda: census.is_gone(pid), SOON_S, "the resisting executor was killed")
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3


def test_a_resisting_function_does_not_hold_up_the_close(site: isthmus.Site, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    site.submit(resist, str(mark))
    census.wait_until(lambda: mark.exists() and mark.read_text() != "", SOON_S, "the call runs")
    start_s = time.monotonic()
    site.close()
    assert time.monotonic() - start_s < 2 * GOING_S


def hide_in_c() -> None:
    """Blocks every signal in a way that no Python handler can run."""
    libc = ctypes.PyDLL(None)  # holds the GIL
    while True:
        libc.sleep(600)


def test_a_function_stuck_in_c_is_killed_on_cancel(site: isthmus.Site) -> None:
    future = site.submit(hide_in_c)
    assert future.cancel()
    assert future.cancelled()
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3


def close_every_descriptor() -> None:
    os.closerange(0, 4096)


def test_an_executor_without_descriptors_is_replaced(site: isthmus.Site) -> None:
    """Its answer may still leave by shared memory; what comes next does not find out the hard way."""
    executor = site.call(os.getpid)
    with contextlib.suppress(isthmus.ExecutorLostError):
        site.submit(close_every_descriptor).result(timeout_s=SOON_S)
    assert site.submit(os.getpid).result(timeout_s=SOON_S) != executor
    census.wait_until(lambda: census.is_gone(executor), SOON_S, "the executor without descriptors ended")


MUCH_BYTES = 48 * 2**20


def write_without_end(mark: str) -> None:
    written_bytes = 0
    while True:
        written_bytes += sys.stdout.write("x" * 65535 + "\n")
        if written_bytes > MUCH_BYTES:
            Path(mark).touch()


def test_output_without_end_fills_no_disk_and_can_be_cancelled(
    leaks: Leaks, environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit_bytes = 2**20
    monkeypatch.setenv("ISTHMUS_NODE__LOG_BYTES_MAX", str(limit_bytes))
    with isthmus.connect() as site:
        future = site.submit(write_without_end, str(tmp_path / "mark"))
        census.wait_until((tmp_path / "mark").exists, 3 * SOON_S, "much was written")
        leaks.note()
        (log,) = doors.find().state.glob("leases/*/log")
        assert future.cancel()
        assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3
        census.wait_until(
            lambda: not log.exists() or log.stat().st_blocks * 512 <= 2 * limit_bytes, SOON_S, "it was cut"
        )


def raise_unpicklable() -> None:
    class Local(Exception):
        def __reduce__(self) -> str:
            raise TypeError("never leaves this process")

    raise Local("text that must arrive")


def return_unpicklable() -> object:
    return threading.Lock()


def test_what_cannot_travel_back_says_so(site: isthmus.Site) -> None:
    with pytest.raises(isthmus.RemoteError, match="text that must arrive"):
        site.submit(raise_unpicklable).result(timeout_s=SOON_S)
    with pytest.raises((isthmus.CodecError, TypeError)):
        site.submit(return_unpicklable).result(timeout_s=SOON_S)
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3


def recurse(depth: int) -> int:
    return recurse(depth + 1)


def test_endless_recursion_is_an_ordinary_exception(site: isthmus.Site) -> None:
    with pytest.raises(RecursionError):
        site.submit(recurse, 0).result(timeout_s=SOON_S)
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3
