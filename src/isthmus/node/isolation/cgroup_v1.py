"""cgroup version 1: one directory per lease in each controller's hierarchy, below this process's own
group.
"""

import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path

from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.node.isolation import groups
from isthmus.node.isolation.isolation import (
    GROUP_PREFIX,
    PIDS_MAX,
    Consumption,
    Share,
    reserve_name,
)

_REQUIRED = ("cpuset", "memory")
_OPTIONAL = ("pids", "cpu", "cpuacct")


class CgroupV1:
    enforcement = Enforcement(cores="cpuset", memory="cgroup", mechanism="cgroup-v1")
    mechanism = "cgroup-v1"

    def __init__(self, tag: str, mounts: Mapping[str, Path] | None = None) -> None:
        """tag: names the state directory, so that two agents of one machine keep apart."""
        self._prefix = f"{GROUP_PREFIX}{tag}-"
        self._bases = _own_bases(groups.mounts() if mounts is None else mounts)

    def probe(self) -> str:
        missing = [name for name in _REQUIRED if name not in self._bases]
        if missing:
            return f"no version 1 hierarchy for {' and '.join(missing)}"
        lease = LeaseId("probe")
        try:
            cores = self._cores_allowed()
            self.create(lease, Share(cores[:1], 64 * 2**20))
            self.destroy(lease)
        except OSError as error:
            return f"not permitted: {error}"
        return ""

    def reserve(self, pid: int) -> None:
        """A group of its own, renamed when it gets a lease: moving a process can cost the kernel 20 ms."""
        name = reserve_name(pid)
        for base in self._bases.values():
            (base / (self._prefix + name)).mkdir(exist_ok=True)
        cpuset = self._group("cpuset", name)
        for file in ("cpuset.mems", "cpuset.cpus"):
            groups.write(cpuset / file, (cpuset.parent / file).read_text().strip())
        self.attach(name, pid)

    def create(self, lease: LeaseId, share: Share, reserved: int = 0) -> Enforcement:
        for controller, base in self._bases.items():
            group = base / (self._prefix + lease)
            spare = base / (self._prefix + reserve_name(reserved))
            if reserved and spare.exists() and not group.exists():
                spare.rename(group)
            group.mkdir(exist_ok=True)
            self._configure(controller, group, share)
        return self.enforcement

    def attach(self, lease: LeaseId, pid: int) -> None:
        for base in self._bases.values():
            group = base / (self._prefix + lease)
            if pid not in groups.pids(group):
                groups.write(group / "cgroup.procs", pid)
            if lease != reserve_name(pid):
                with contextlib.suppress(OSError):  # mostly there is none
                    (base / (self._prefix + reserve_name(pid))).rmdir()

    def consumption(self, lease: LeaseId) -> Consumption:
        memory = self._group("memory", lease)
        cached = groups.read_field(memory / "memory.stat", "total_cache")
        return Consumption(
            cpu_ns=groups.read_number(self._group("cpuacct", lease) / "cpuacct.usage"),
            rss_bytes=max(0, groups.read_number(memory / "memory.usage_in_bytes") - cached),
            rss_bytes_max=groups.read_number(memory / "memory.max_usage_in_bytes"),
        )

    def oom_kills(self, lease: LeaseId) -> int:
        return groups.read_field(self._group("memory", lease) / "memory.oom_control", "oom_kill")

    def freeze(self, lease: LeaseId) -> None:
        groups.signal_all(lambda: groups.pids(self._group("cpuset", lease)), signal.SIGSTOP)

    def thaw(self, lease: LeaseId) -> None:
        groups.signal_all(lambda: groups.pids(self._group("cpuset", lease)), signal.SIGCONT)

    def destroy(self, lease: LeaseId) -> None:
        found = [group for base in self._bases.values() if (group := base / (self._prefix + lease)).exists()]
        if "pids" in self._bases and self._group("pids", lease) in found:
            groups.write(self._group("pids", lease) / "pids.max", 0)  # or a fork bomb outruns the kills
        for group in found:
            groups.kill_all(group)
        for group in found:
            groups.remove(group)

    def group(self, lease: LeaseId) -> Path | None:
        return None

    def sweep(self) -> None:
        for base in self._bases.values():
            groups.sweep(base, GROUP_PREFIX)

    def remains(self) -> list[LeaseId]:
        names = {path.name for base in self._bases.values() for path in base.glob(self._prefix + "*")}
        return sorted(LeaseId(name.removeprefix(self._prefix)) for name in names)

    def _group(self, controller: str, lease: LeaseId) -> Path:
        return self._bases.get(controller, Path("/nonexistent")) / (self._prefix + lease)

    def _cores_allowed(self) -> tuple[int, ...]:
        text = (self._bases["cpuset"] / "cpuset.cpus").read_text()
        return tuple(parse_cores(text))

    def _configure(self, controller: str, group: Path, share: Share) -> None:
        if controller == "cpuset":
            groups.write(group / "cpuset.mems", (group.parent / "cpuset.mems").read_text().strip())
            groups.write(group / "cpuset.cpus", groups.format_cores(share.cores))
        elif controller == "memory":
            groups.write(group / "memory.limit_in_bytes", share.memory_bytes)
            with_swap = group / "memory.memsw.limit_in_bytes"
            if with_swap.exists():  # absent where the kernel does not account swap
                groups.write(with_swap, share.memory_bytes)
        elif controller == "pids":
            groups.write(group / "pids.max", PIDS_MAX)
        elif controller == "cpu":
            if not groups.is_idle(group):
                groups.write(group / "cpu.shares", 2 if share.idle_cores else 1024 * len(share.cores))
            if share.idle_cores:
                groups.write(group / "cpu.cfs_quota_us", share.idle_cores * groups.QUOTA_PERIOD_US)
                groups.make_idle(group)


def parse_cores(text: str) -> list[int]:
    """`0-3,8` as the kernel writes sets of cores."""
    cores: list[int] = []
    for part in text.strip().split(","):
        first, _, final = part.partition("-")
        if first:
            cores.extend(range(int(first), int(final or first) + 1))
    return cores


def _own_bases(mounts: Mapping[str, Path]) -> dict[str, Path]:
    """This process's own group in each hierarchy; the mount itself where a container hides the group."""
    bases = {}
    for controller in _REQUIRED + _OPTIONAL:
        if controller in mounts:
            own = mounts[controller] / groups.own_group(controller).lstrip("/")
            bases[controller] = own if own.is_dir() else mounts[controller]
    return bases
