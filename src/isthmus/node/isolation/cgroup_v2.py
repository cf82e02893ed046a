"""cgroup version 2: one directory per lease below this process's own group, or below one delegated by
systemd.

Version 2 forbids processes in a group that hands controllers to its children (except the root), so the agent
first moves itself, and the site that started it, into a leaf of its own. That is done only where nobody else
lives in the group. Without the cpuset controller, which systemd keeps from plain users unless told otherwise,
a lease has a quota of processor time in place of cores of its own.
"""

import os
from pathlib import Path
from typing import Literal

from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.node.isolation import groups
from isthmus.node.isolation.isolation import GROUP_PREFIX, PIDS_MAX, Consumption, Share

_REQUIRED = frozenset({"memory", "pids"})
_OF_CORES = frozenset({"cpuset", "cpu"})  # one of them must be there
LEAF = "agent"  # no lease is called so
_WEIGHT_OF_CORE, _WEIGHT_MAX = 100, 10_000  # the kernel's default for a whole group, and its limit


class CgroupV2:
    mechanism: Literal["cgroup-v2", "systemd"] = "cgroup-v2"

    def __init__(self, tag: str, base: Path | None = None) -> None:
        """base: the group to work below; by default this process's own."""
        self._prefix = f"{GROUP_PREFIX}{tag}-"
        self._base = self._own_base() if base is None else base

    @property
    def enforcement(self) -> Enforcement:
        has_cores = "cpuset" in self._controllers()
        detail = "" if has_cores else "cores are a quota of processor time: no cpuset controller is delegated"
        return Enforcement(
            cores="cpuset" if has_cores else "cpu-quota",
            memory="cgroup", mechanism=self.mechanism, detail=detail,
        )  # fmt: skip

    def probe(self) -> str:
        if self._base is None:
            return "no version 2 hierarchy is mounted"
        offered = self._controllers()
        missing = sorted(_REQUIRED - offered) + ([] if offered & _OF_CORES else ["cpuset or cpu"])
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
        self._limit_cores(group, share)
        groups.write(group / "memory.max", share.memory_bytes)
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

    def freeze(self, lease: LeaseId) -> None:
        groups.write(self._group(lease) / "cgroup.freeze", 1)

    def thaw(self, lease: LeaseId) -> None:
        groups.write(self._group(lease) / "cgroup.freeze", 0)

    def destroy(self, lease: LeaseId) -> None:
        group = self._group(lease)
        if not group.exists():
            return
        groups.write(group / "pids.max", 0)  # or a fork bomb outruns the kills
        if (group / "cgroup.kill").exists():  # since Linux 5.14: all at once
            groups.write(group / "cgroup.kill", 1)
        groups.kill_all(group)
        groups.remove(group)

    def group(self, lease: LeaseId) -> Path | None:
        return self._group(lease)

    def sweep(self) -> None:
        if self._base is not None:
            groups.sweep(self._base, GROUP_PREFIX)

    def remains(self) -> list[LeaseId]:
        if self._base is None:
            return []
        names = (path.name.removeprefix(self._prefix) for path in self._base.glob(self._prefix + "*"))
        return sorted(LeaseId(name) for name in names if name != LEAF)

    def _group(self, lease: LeaseId) -> Path:
        assert self._base is not None
        return self._base / (self._prefix + lease)

    def _controllers(self) -> set[str]:
        if self._base is None:
            return set()
        try:
            return set((self._base / "cgroup.controllers").read_text().split())
        except OSError:
            return set()

    def _limit_cores(self, group: Path, share: Share) -> None:
        offered, count = self._controllers(), share.idle_cores or len(share.cores)
        if "cpuset" in offered:
            groups.write(group / "cpuset.cpus", groups.format_cores(share.cores))
        if "cpu" in offered and not groups.is_idle(group):
            groups.write(group / "cpu.weight", min(count * _WEIGHT_OF_CORE, _WEIGHT_MAX))
        if share.idle_cores:
            groups.make_idle(group)
        if "cpuset" not in offered or (share.idle_cores and "cpu" in offered):
            groups.write(group / "cpu.max", f"{count * groups.QUOTA_PERIOD_US} {groups.QUOTA_PERIOD_US}")

    def _delegate(self) -> None:
        """Hand the controllers to our children."""
        assert self._base is not None
        control = self._base / "cgroup.subtree_control"
        wanted = self._controllers() & (_REQUIRED | _OF_CORES)
        if wanted <= set(control.read_text().split()):
            return
        members = groups.pids(self._base)
        if set(members) <= {os.getpid(), os.getppid()}:
            leaf = self._base / f"{self._prefix}{LEAF}"
            leaf.mkdir(exist_ok=True)
            for pid in members:
                groups.write(leaf / "cgroup.procs", pid)
        groups.write(control, " ".join(f"+{name}" for name in sorted(wanted)))

    def _own_base(self) -> Path | None:
        """This process's own group; the one above where an agent was already moved into its leaf."""
        mount = groups.mounts().get("")
        if mount is None:
            return None
        own = mount / groups.own_group("").lstrip("/")
        if own.name == f"{self._prefix}{LEAF}":
            own = own.parent
        return own if own.is_dir() else mount
