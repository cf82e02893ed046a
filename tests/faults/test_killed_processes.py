"""Any process may be killed at any instant: calls end in a value or the right typed error, within seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import isthmus
from tests.faults import census
from tests.faults.conftest import Leaks

SOON_S = 10.0


def add(left: int, right: int) -> int:
    return left + right


def sleep(mark: str, duration_s: float) -> int:
    """Say where we run, then take long."""
    Path(mark).write_text(str(os.getpid()))
    time.sleep(duration_s)
    return os.getpid()


def written_pid(mark: Path) -> int:
    """The process that runs `sleep`, as soon as it does."""
    census.wait_until(lambda: mark.exists() and mark.read_text() != "", SOON_S, "the call runs")
    return int(mark.read_text())


def test_an_idle_executor_that_is_killed_is_replaced(site: isthmus.Site) -> None:
    """A call that never left cannot have run: it goes to another executor, on either path to one."""
    for call in (site.call, lambda fn: site.submit(fn).result(timeout_s=SOON_S)):
        pid = site.call(os.getpid)
        census.kill(pid)
        reaped = Path(f"/proc/{pid}")  # a zombie's other threads may hold its sockets open a moment longer
        census.wait_until(lambda reaped=reaped: not reaped.exists(), SOON_S, "the executor is reaped")
        assert call(os.getpid) != pid


def test_a_call_whose_executor_is_killed_says_so(site: isthmus.Site, tmp_path: Path) -> None:
    future = site.submit(sleep, str(tmp_path / "mark"), 60.0)
    census.kill(written_pid(tmp_path / "mark"))
    with pytest.raises(isthmus.ExecutorLostError, match="SIGKILL"):
        future.result(timeout_s=SOON_S)
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3


def test_calls_queued_behind_the_killed_one_run_elsewhere(site: isthmus.Site, tmp_path: Path) -> None:
    """Only the call that ran is lost, and it ran once: those before are answered, those behind wait."""
    before = [site.submit(add, number, number) for number in range(200)]
    killed = site.submit(sleep, str(tmp_path / "mark"), 60.0)
    behind = [site.submit(add, number, number) for number in range(200)]
    pid = written_pid(tmp_path / "mark")
    census.kill(pid)
    with pytest.raises(isthmus.ExecutorLostError):
        killed.result(timeout_s=SOON_S)
    sums = [future.result(timeout_s=SOON_S) for future in before + behind]
    assert sums == [2 * number for number in range(200)] * 2
    assert written_pid(tmp_path / "mark") == pid


def test_a_retried_call_survives_its_executor(site: isthmus.Site, tmp_path: Path) -> None:
    @isthmus.function(retries=isthmus.Retry(max=2, on=(isthmus.ExecutorLostError,)))
    def once_killed(mark: str) -> str:
        if Path(mark).exists():
            return "second time"
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
        return "never"

    assert site.submit(once_killed, str(tmp_path / "mark")).result(timeout_s=SOON_S) == "second time"


def test_a_killed_zygote_takes_no_executor_with_it(site: isthmus.Site, tmp_path: Path) -> None:
    executor = site.call(os.getpid)
    zygotes = [pid for pid in census.find("zygote") if os.getsid(pid) != pid or pid != executor]
    for pid in zygotes:
        if pid != executor:
            census.kill(pid)
    assert site.submit(os.getpid).result(timeout_s=SOON_S) == executor
    others = [site.submit(sleep, str(tmp_path / f"mark{n}"), 0.2) for n in range(2)]
    assert all(future.result(timeout_s=2 * SOON_S) for future in others)


def test_a_restarted_agent_keeps_running_calls_and_takes_new_leases(
    site: isthmus.Site, tmp_path: Path
) -> None:
    running = site.submit(sleep, str(tmp_path / "mark"), 3.0)
    pid = written_pid(tmp_path / "mark")
    census.kill(census.find("agent")[0])
    assert site.submit(os.getpid).result(timeout_s=2 * SOON_S) != pid
    assert running.result(timeout_s=SOON_S) == pid


def test_calls_go_on_while_the_agent_is_dead(site: isthmus.Site) -> None:
    executor = site.call(os.getpid)
    (agent,) = census.find("agent")
    census.kill(agent)
    assert site.submit(os.getpid).result(timeout_s=SOON_S) == executor
    census.wait_until(lambda: census.find("agent") not in ([], [agent]), SOON_S, "the agent is restarted")
    assert site.submit(os.getpid).result(timeout_s=SOON_S) == executor


def test_a_site_that_ends_without_an_agent_leaves_nothing(site: isthmus.Site) -> None:
    """`leaks` finds the executor, its group and its memory, if nobody ends them."""
    (agent,) = census.find("agent")
    census.kill(agent)
    census.wait_until(lambda: census.is_gone(agent), SOON_S, "agent dead")
    site.close()


def test_calls_go_on_while_the_site_is_dead(site: isthmus.Site) -> None:
    executor = site.call(os.getpid)
    (process,) = census.find("site")
    census.kill(process)
    census.wait_until(lambda: census.is_gone(process), SOON_S, "site dead")
    assert [site.call(os.getpid) for _ in range(100)] == [executor] * 100


def test_a_dead_site_is_named_when_a_new_lease_is_needed(site: isthmus.Site) -> None:
    @isthmus.function(isthmus.Resources(cores=2))
    def elsewhere() -> int:
        return os.getpid()

    census.kill(census.find("site")[0])
    with pytest.raises(isthmus.SiteUnavailableError):
        site.submit(elsewhere).result(timeout_s=2 * SOON_S)


CLIENT = """
import os, signal, sys, time
import isthmus

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has its children ignore it

def forever(mark):
    open(mark, "w").write("runs")
    time.sleep(600)

if __name__ == "__main__":
    site = isthmus.connect()
    assert site.call(os.getpid) != os.getpid()
    future = site.submit(forever, sys.argv[1])
    future.result()
"""


@pytest.fixture
def start_client(environment: None, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a client process with an embedded site of its own; returns when its long call runs."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        program, mark = tmp_path / "client.py", tmp_path / "client.mark"
        program.write_text(CLIENT)
        started.append(subprocess.Popen([sys.executable, str(program), str(mark)]))
        census.wait_until(mark.exists, 3 * SOON_S, "the client's call runs")
        return started[-1]

    yield start
    for process in started:  # those of a test that failed would fail others
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_client_that_dies_takes_its_embedded_site_with_it(
    start_client: Callable[[], subprocess.Popen[bytes]], leaks: Leaks, number: signal.Signals
) -> None:
    client = start_client()
    leaks.note()
    census.kill(client.pid, number)
    client.wait(timeout=SOON_S)


def test_everything_ends_when_site_and_client_are_killed_together(
    start_client: Callable[[], subprocess.Popen[bytes]], leaks: Leaks
) -> None:
    client = start_client()
    leaks.note()
    census.kill(census.find("site")[0])
    census.kill(client.pid)
    client.wait(timeout=SOON_S)


def test_a_stopped_executor_cannot_hold_a_call_beyond_its_timeout(site: isthmus.Site) -> None:
    @isthmus.function(timeout_s=1.0)
    def quick() -> int:
        return os.getpid()

    stopped = site.call(quick)
    os.kill(stopped, signal.SIGSTOP)
    start_s = time.monotonic()
    with pytest.raises(isthmus.CallTimeoutError):
        site.submit(quick).result(timeout_s=SOON_S)
    assert time.monotonic() - start_s < 5.0
    census.wait_until(lambda: census.is_gone(stopped), SOON_S, "the stopped executor was killed")
    assert site.submit(quick).result(timeout_s=SOON_S) != stopped
