"""Real sites as subprocesses, for live tests: start, ask, stop, and look for what was left behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.live.processes import descendants, running_below

READY_TIMEOUT_S = 60.0


class RunningSite:
    def __init__(self, process: subprocess.Popen[bytes], state: Path, url: str) -> None:
        self.process = process
        self.state = state
        self.url = url

    @property
    def key(self) -> str:
        return (self.state / "key").read_text()

    def client(self, key: str | None = None) -> httpx.Client:
        """A client with the site's own key, or another; "" sends none."""
        bearer = self.key if key is None else key
        headers = {"authorization": f"Bearer {bearer}"} if bearer else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60.0, verify=False)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(READY_TIMEOUT_S)

    def is_running(self, name: bytes) -> bool:
        """Whether a process of that name descends from it."""
        return bool(running_below(self.process.pid, name))

    def descendants(self) -> list[int]:
        return descendants(self.process.pid)


@contextlib.contextmanager
def running_site(state: Path, *arguments: str, **environment: str) -> Iterator[RunningSite]:
    """A site that is ready, and is gone at the end of the block however it went."""
    process, line = start(state, *arguments, **environment)
    if not line:
        raise AssertionError(f"the site did not start: {process.communicate()[1].decode()}")
    try:
        yield RunningSite(process, state, json.loads(line)["url"])
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=READY_TIMEOUT_S)


def start(state: Path, *arguments: str, **environment: str) -> tuple[subprocess.Popen[bytes], bytes]:
    """The process and its ready line, which is empty when it refused to start."""
    ready, told = os.pipe()
    command = [
        sys.executable,
        "-m",
        "isthmus",
        "up",
        "--state",
        str(state),
        "--ready-fd",
        str(told),
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        pass_fds=[told],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=clean_environment(environment),
    )
    os.close(told)
    with open(ready, "rb") as pipe:
        return process, pipe.readline()


def clean_environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of isthmus that a developer may have."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    return {**kept, **(more or {})}


def gone(pids: list[int], timeout_s: float = 10.0) -> bool:
    """Whether all these processes end within the time."""
    give_up_s = time.monotonic() + timeout_s
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
