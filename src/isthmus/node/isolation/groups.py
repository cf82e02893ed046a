"""What both versions of cgroups share: directories, their files, and emptying them of processes."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.node.processes import send_signal

STALE_S = 600.0  # far longer than a lease takes to start
QUOTA_PERIOD_US = 100_000  # over which a quota of processor time holds: the kernel's default
KILL_WAIT_S = 5.0  # a process in uninterruptible sleep may take this long to go


def write(path: Path, value: int | str) -> None:
    """One write of a control file. Raises OSError naming the file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, str(value).encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (writing {value!r})", str(path)) from error


def read_number(path: Path) -> int:
    """0 when the file is missing: the kernel does not offer that figure, or the group is gone."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def read_field(path: Path, field: str) -> int:
    """A line `field NUMBER` of a keyed file; 0 when missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        key, _, value = line.partition(" ")
        if key == field:
            return int(value)
    return 0


def format_cores(cores: tuple[int, ...]) -> str:
    return ",".join(str(core) for core in sorted(cores))


def pids(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def kill_all(group: Path) -> None:
    """SIGKILL everything in a group until nothing is left, or KILL_WAIT_S passed."""
    deadline_s = time.monotonic() + KILL_WAIT_S
    pause_s = 0.0005
    while (members := pids(group)) and time.monotonic() < deadline_s:
        for pid in members:
            send_signal(pid, signal.SIGKILL)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.05)


def signal_all(members: Callable[[], list[int]], number: int) -> None:
    """Signal every member once, those forked meanwhile too."""
    told: set[int] = set()
    while news := set(members()) - told:
        for pid in news:
            send_signal(pid, number)
        told |= news


def make_idle(group: Path) -> None:
    """The group runs only where nobody else wants to, from Linux 5.15 on. Before that, the class of its
    processes must do (`idling.py`).
    """
    with contextlib.suppress(OSError):
        write(group / "cpu.idle", 1)


def is_idle(group: Path) -> bool:
    """As one that is adopted may be: then the kernel refuses to give it shares or weight."""
    with contextlib.suppress(OSError):
        return (group / "cpu.idle").read_text().strip() == "1"
    return False


def remove(group: Path) -> None:
    """rmdir, as soon as the kernel has let go of the dead."""
    deadline_s = time.monotonic() + KILL_WAIT_S
    while True:
        try:
            return group.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.002)


def sweep(base: Path, prefix: str) -> None:
    """Remove empty groups of this prefix below `base`, older than STALE_S: nobody is starting in them."""
    for group in base.glob(prefix + "*"):
        with contextlib.suppress(OSError):  # gone meanwhile, in use, or somebody else's
            if time.time() - group.stat().st_mtime > STALE_S and not pids(group):
                group.rmdir()


def own_group(controller: str) -> str:
    """This process's path in the hierarchy of a controller ("" for version 2), like `/user.slice`."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(",") if controller else names == "":
            return path
    return "/"


def mounts() -> dict[str, Path]:
    """Where cgroup hierarchies are mounted: by controller name; version 2 under ""."""
    found: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.setdefault("", Path(point))
        elif kind == "cgroup":
            for option in options.split(","):
                found.setdefault(option, Path(point))
    return found
