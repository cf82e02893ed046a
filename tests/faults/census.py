"""Who is alive below this process, and what the dead left behind.

`adopt_orphans` makes this process the parent of every descendant whose own parent dies, so `descendants`
misses nobody and counts nobody else's processes, however many other sites run on the machine.
"""

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

PR_SET_CHILD_SUBREAPER = 36
_PAUSE_S = 0.02


class Process(NamedTuple):
    pid: int
    parent: int
    state: str
    command: str

    @property
    def role(self) -> str:
        """`site`, `agent`, `zygote` (executors included: they are forks of it), or `other`."""
        for role, word in (
            ("site", " -m isthmus up"),
            ("agent", "isthmus.node.agent"),
            ("zygote", "isthmus.node.zygote"),
        ):
            if word in self.command:
                return role
        return "other"


def adopt_orphans(adopt: bool = True) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def descendants(root: int | None = None) -> list[Process]:
    """Live processes below `root` (default: this process), zombies left out."""
    root = os.getpid() if root is None else root
    everyone = {process.pid: process for process in _everyone()}
    children: dict[int, list[Process]] = {}
    for process in everyone.values():
        children.setdefault(process.parent, []).append(process)
    found, unseen = [], [root]
    while unseen:
        for child in children.get(unseen.pop(), []):
            unseen.append(child.pid)
            if child.state not in "ZX":
                found.append(child)
    return found


def find(role: str, root: int | None = None) -> list[int]:
    return [process.pid for process in descendants(root) if process.role == role]


def zygotes() -> tuple[list[int], list[int]]:
    """Zygotes below this process, and the executors forked from them."""
    alive = descendants()
    roles = {process.pid: process.role for process in alive}
    forked = [one for one in alive if one.role == "zygote" and roles.get(one.parent) != "agent"]
    forks = {one.pid for one in forked}
    return [one.pid for one in alive if one.role == "zygote" and one.pid not in forks], sorted(forks)


def cgroups(pids: list[int]) -> set[Path]:
    """The cgroup directories below the hierarchies' roots that these processes are in, those of this process
    itself left out.
    """
    own = _cgroups_of(os.getpid())
    found = set().union(*(_cgroups_of(pid) for pid in pids)) - own
    return {path for path in found if (path.parent / "cgroup.procs").exists()}  # roots have no such parent


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that is gone already is fine."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def reap_orphans(known: set[int]) -> None:
    """Wait for dead children that nobody else waits for; `known` are the pids that somebody does."""
    for process in _everyone():
        if process.parent == os.getpid() and process.state == "Z" and process.pid not in known:
            try:
                os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                continue


def wait_until(holds: Callable[[], bool], limit_s: float, what: str) -> None:
    """Look again until it holds. Only for facts of other processes that no event tells of."""
    until_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < until_s, f"after {limit_s:g} s still not: {what}"
        time.sleep(_PAUSE_S)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _everyone() -> Iterator[Process]:
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                continue
            raise
        yield Process(int(entry.name), int(stat[1]), stat[0], command.strip())


def _cgroups_of(pid: int) -> set[Path]:
    found = set()
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        name = controllers.removeprefix("name=").split(",")[0] or "unified"
        for base in (
            Path("/sys/fs/cgroup", controllers),
            Path("/sys/fs/cgroup", name),
            Path("/sys/fs/cgroup"),
        ):
            if (base / path.lstrip("/")).is_dir() and (base / "cgroup.procs").exists():
                found.add(base / path.lstrip("/"))
                break
    return found
