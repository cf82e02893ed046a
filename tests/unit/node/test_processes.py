"""What /proc says."""

import os
import signal
import subprocess

import pytest

from isthmus.node import processes


def test_this_process_is_alive_under_its_own_start_and_no_other() -> None:
    started = processes.start_ticks(os.getpid())
    assert processes.is_alive(os.getpid(), started)
    assert not processes.is_alive(os.getpid(), started + 1)
    assert processes.rss_bytes(os.getpid()) > 2**20
    assert processes.cpu_ns(os.getpid()) > 0


def test_a_process_that_is_gone_counts_nothing() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert processes.start_ticks(child.pid) == 0
    assert not processes.is_alive(child.pid, 1)
    assert (processes.cpu_ns(child.pid), processes.rss_bytes(child.pid)) == (0, 0)
    assert not processes.send_signal(child.pid, signal.SIGTERM)


def test_members_of_a_session_are_found() -> None:
    leader = subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True)
    try:
        while len(members := processes.session_members({leader.pid})) < 2:
            pass
        assert leader.pid in members
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-11, "signal SIGSEGV"),
        (-63, "signal 63"),
        (None, "its exit status is unknown"),
    ],
)
def test_ends_are_put_into_words(status: int | None, words: str) -> None:
    assert processes.describe_exit(status) == words
