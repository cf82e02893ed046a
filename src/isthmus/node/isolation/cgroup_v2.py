"""cgroup version 2: one directory per lease below this process's own group, or below one delegated by
systemd.

Version 2 forbids processes in a group that hands controllers to its children (except the root), so the agent
first moves itself into a leaf of its own. That is done only where nobody else lives in the group.
"""

import os
from pathlib import Path

from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.node.isolation import groups
from isthmus.node.isolation.isolation import GROUP_PREFIX, PIDS_MAX, Consumption, Share

_CONTROLLERS = ("cpuset", "memory", "pids")


class CgroupV2:
    enforcement = Enforcement(cores="cpuset", memory="cgroup", mechanism="cgroup-v2")
    mechanism = "cgroup-v2"

    def __init__(self, tag: str, base: Path | None = None) -> None:
        """base: the group to work below; by default this process's own."""
        self._prefix = f"{GROUP_PREFIX}{tag}-"
        self._base = _own_base() if base is None else base

    def probe(self) -> str:
        if self._base is None:
            return "no version 2 hierarchy is mounted"
        missing = sorted(set(_CONTROLLERS) - self._controllers())
        if missing:
            return f"{self._base} offers no {', '.join(missing)} controller"
        lease = LeaseId("probe")
        try:
            self._delegate()
            self.create(lease, Share(tuple(sorted(os.sched_getaffinity(0)))[:1], 64 * 2**20))
            self.destroy(lease)
        except OSError as error:
            return f"not permitted: {error}"
        return ""

    def reserve(self, pid: int) -> None:
        return None

    def create(self, lease: LeaseId, share: Share, reserved: int = 0) -> Enforcement:
        group = self._group(lease)
        group.mkdir(exist_ok=True)
        groups.write(group / "cpuset.cpus", groups.format_cores(share.cores))
        groups.write(group / "memory.max", share.memory_bytes)
        groups.write(group / "memory.high", share.memory_bytes - share.memory_bytes // 32)
        if (group / "memory.swap.max").exists():
            groups.write(group / "memory.swap.max", 0)
        groups.write(group / "pids.max", PIDS_MAX)
        return self.enforcement

    def attach(self, lease: LeaseId, pid: int) -> None:
        groups.write(self._group(lease) / "cgroup.procs", pid)

    def consumption(self, lease: LeaseId) -> Consumption:
        group = self._group(lease)
        return Consumption(
            cpu_ns=groups.read_field(group / "cpu.stat", "usage_usec") * 1000,
            rss_bytes=groups.read_field(group / "memory.stat", "anon"),
            rss_bytes_max=groups.read_number(group / "memory.peak"),
        )

    def oom_kills(self, lease: LeaseId) -> int:
        return groups.read_field(self._group(lease) / "memory.events", "oom_kill")

    def destroy(self, lease: LeaseId) -> None:
        group = self._group(lease)
        if not group.exists():
            return
        groups.write(group / "pids.max", 0)  # or a fork bomb outruns the kills
        groups.kill_all(group)
        groups.remove(group)

    def sweep(self) -> None:
        if self._base is not None:
            groups.sweep(self._base, GROUP_PREFIX)

    def remains(self) -> list[LeaseId]:
        if self._base is None:
            return []
        names = (path.name.removeprefix(self._prefix) for path in self._base.glob(self._prefix + "*"))
        return sorted(LeaseId(name) for name in names if name != "agent")

    def _group(self, lease: LeaseId) -> Path:
        assert self._base is not None
        return self._base / (self._prefix + lease)

    def _controllers(self) -> set[str]:
        assert self._base is not None
        try:
            return set((self._base / "cgroup.controllers").read_text().split())
        except OSError:
            return set()

    def _delegate(self) -> None:
        """Hand the controllers to our children."""
        assert self._base is not None
        control = self._base / "cgroup.subtree_control"
        if set(_CONTROLLERS) <= set(control.read_text().split()):
            return
        wanted = " ".join(f"+{name}" for name in _CONTROLLERS)
        if groups.pids(self._base) == [os.getpid()]:
            leaf = self._base / f"{self._prefix}agent"
            leaf.mkdir(exist_ok=True)
            groups.write(leaf / "cgroup.procs", os.getpid())
        groups.write(control, wanted)


def _own_base() -> Path | None:
    mount = groups.mounts().get("")
    if mount is None:
        return None
    own = mount / groups.own_group("").lstrip("/")
    return own if own.is_dir() else mount
