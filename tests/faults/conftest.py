"""Every fault test runs under a strict check: whatever was killed, nothing may be left behind."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import isthmus
from tests.faults import census

GONE_S = 10.0
"""How long what is left may take to go by itself after a test."""


class Leaks:
    """What must be gone at the end. `note` records what only the living tell: cgroups and state folders."""

    def __init__(self) -> None:
        self._descriptors = descriptors()
        self._threads = set(threading.enumerate())
        self._shared = shared_memory()
        self._before = {process.pid for process in census.descendants()}
        self._cgroups: set[Path] = set()
        self._folders: set[Path] = set()

    def note(self) -> None:
        processes = census.descendants()
        self._cgroups |= census.cgroups([process.pid for process in processes])
        for process in processes:
            words = process.command.split()
            if process.role == "site" and "--state" in words:
                self._folders.add(Path(words[words.index("--state") + 1]))

    def found(self) -> list[str]:
        """One line for each thing that is left."""
        census.reap_orphans(self._before)
        left = [f"process {process.pid}: {process.command}" for process in self._processes()]
        left += [f"cgroup {path}" for path in self._cgroups if path.exists()]
        left += [f"folder {path}" for path in self._folders if path.exists()]
        left += [f"shared memory {name}" for name in shared_memory() - self._shared if not is_held(name)]
        left += [f"descriptor {number}: {target}" for number, target in descriptors() - self._descriptors]
        left += [f"thread {thread.name}" for thread in set(threading.enumerate()) - self._threads]
        return left

    def kill(self) -> None:
        for process in self._processes():
            census.kill(process.pid)

    def _processes(self) -> list[census.Process]:
        """Those that were here before are other tests': a cluster, a site."""
        return [process for process in census.descendants() if process.pid not in self._before]


@pytest.fixture(autouse=True)
def leaks() -> Iterator[Leaks]:
    census.adopt_orphans()
    watch = Leaks()
    yield watch
    try:
        census.wait_until(lambda: not watch.found(), GONE_S, "nothing left")
    except AssertionError:
        pytest.fail("left behind: " + "; ".join(watch.found()))
    finally:
        watch.kill()
        census.adopt_orphans(False)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No site but our own is found, and clients of our own subprocesses find the same nothing."""
    for name in [name for name in os.environ if name.startswith("ISTHMUS_")]:
        monkeypatch.delenv(name)
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("ISTHMUS_NODE__CORES", "2")


@pytest.fixture
def site(leaks: Leaks, environment: None) -> Iterator[isthmus.Site]:
    """An embedded site of this test's own, with one executor warm."""
    with isthmus.connect() as site:
        site.call(os.getpid)
        leaks.note()
        yield site
        leaks.note()


def descriptors() -> set[tuple[int, str]]:
    """Open descriptors of this process and what they are."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def is_held(name: str) -> bool:
    """Whether any process still has this shared memory file open or mapped."""
    path = f"/dev/shm/{name}"
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if path in (process / "maps").read_text():
                return True
            if any(os.readlink(link) == path for link in (process / "fd").iterdir()):
                return True
        except OSError:
            continue
    return False
