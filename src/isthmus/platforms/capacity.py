"""How much of this machine isthmus may lease: what the settings say, else what this process may use
itself.
"""

import os
import socket
from pathlib import Path

from isthmus.core.errors import SettingsError
from isthmus.core.settings import NodeSettings
from isthmus.core.units import parse_bytes

MEMORY_SHARE = (
    0.8  # of what is there, when the settings name no amount: the rest is for the system and the site
)
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


def check(settings: NodeSettings) -> None:
    """Raises SettingsError when more cores are named than there are (each lease holds cores of its own), and
    when executors could not listen where they shall.
    """
    usable = len(os.sched_getaffinity(0))
    if settings.cores > usable:
        raise SettingsError(f"node.cores is {settings.cores}, but this process may use {usable} at most")

    if settings.listen.startswith("tcp:"):
        host = settings.listen.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            raise SettingsError(f"node.listen: {host}: {error}; name an address of this machine") from error


def cores(settings: NodeSettings) -> int:
    """`settings.cores`, else the CPUs in this process's affinity mask, at most its cgroup's quota (rounded
    up).
    """
    if settings.cores:
        return settings.cores
    usable = len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    return max(1, min(usable, quota) if quota else usable)


def memory_bytes(settings: NodeSettings) -> int:
    """`settings.memory`, else MEMORY_SHARE of the machine's memory or its cgroup's limit, if less."""
    if settings.memory:
        return parse_bytes(settings.memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_memory_limits()]
    return int(min(limits) * MEMORY_SHARE)


def _cgroup_cores() -> int:
    """The CPU quota in whole cores, rounded up; 0 where there is none."""
    parts = _read("cpu.max").split()  # v2: "200000 100000" or "max 100000"
    if not parts:
        parts = [_read("cpu/cpu.cfs_quota_us").strip(), _read("cpu/cpu.cfs_period_us").strip()]
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        return 0
    quota_us, period_us = int(parts[0]), int(parts[1])
    return -(-quota_us // period_us) if period_us else 0


def _cgroup_memory_limits() -> list[int]:
    texts = [_read("memory.max").strip(), _read("memory/memory.limit_in_bytes").strip()]
    return [int(text) for text in texts if text.isdigit() and 0 < int(text) < _UNLIMITED]


def _read(name: str) -> str:
    """A file of this process's own cgroup (the root of what it sees), or nothing."""
    for root in (*_own_cgroup(), Path("/sys/fs/cgroup")):
        try:
            return (root / name).read_text("ascii")
        except OSError:
            continue
    return ""


def _own_cgroup() -> list[Path]:
    """Where this process is in the unified hierarchy, if there is one."""
    try:
        lines = Path("/proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return []
    return [Path("/sys/fs/cgroup") / line[3:].lstrip("/") for line in lines if line.startswith("0::")]
