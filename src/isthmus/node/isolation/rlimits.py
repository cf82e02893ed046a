"""Without cgroups: CPU affinity, and a limit on each process's data. Honest about being weaker.

The memory limit holds for each process, not for the lease as a whole; affinity can be undone by the code it
binds.
"""

import os
import resource
import signal
import time
from pathlib import Path

from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.node import processes
from isthmus.node.isolation import groups
from isthmus.node.isolation.groups import KILL_WAIT_S
from isthmus.node.isolation.isolation import PIDS_MAX, Consumption, Share

_DETAIL = "memory is limited per process; cores are bound by affinity, which code can undo"


class Rlimits:
    enforcement = Enforcement(cores="affinity", memory="rlimit", mechanism="none", detail=_DETAIL)
    mechanism = "none"

    def __init__(self, tag: str) -> None:
        self._shares: dict[LeaseId, Share] = {}
        self._pids: dict[LeaseId, set[int]] = {}

    def probe(self) -> str:
        return ""

    def reserve(self, pid: int) -> None:
        return None

    def create(self, lease: LeaseId, share: Share, reserved: int = 0) -> Enforcement:
        self._shares[lease] = share
        self._pids.setdefault(lease, set())
        return self.enforcement

    def attach(self, lease: LeaseId, pid: int) -> None:
        share = self._shares[lease]
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), share.cores)
        resource.prlimit(pid, resource.RLIMIT_DATA, (share.memory_bytes, share.memory_bytes))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
        if os.geteuid() != 0:  # the kernel exempts root, and counts per user
            resource.prlimit(pid, resource.RLIMIT_NPROC, (PIDS_MAX * 8, PIDS_MAX * 8))
        self._pids[lease].add(pid)

    def consumption(self, lease: LeaseId) -> Consumption:
        members = self._members(lease)
        return Consumption(
            cpu_ns=sum(processes.cpu_ns(pid) for pid in members),
            rss_bytes=sum(processes.rss_bytes(pid) for pid in members),
            rss_bytes_max=0,
        )

    def oom_kills(self, lease: LeaseId) -> int:
        return 0

    def freeze(self, lease: LeaseId) -> None:
        groups.signal_all(lambda: self._members(lease), signal.SIGSTOP)

    def thaw(self, lease: LeaseId) -> None:
        groups.signal_all(lambda: self._members(lease), signal.SIGCONT)

    def destroy(self, lease: LeaseId) -> None:
        deadline_s = time.monotonic() + KILL_WAIT_S
        while (members := self._members(lease)) and time.monotonic() < deadline_s:
            for pid in members:
                processes.send_signal(pid, signal.SIGKILL)
            time.sleep(0.002)
        self._shares.pop(lease, None)
        self._pids.pop(lease, None)

    def group(self, lease: LeaseId) -> Path | None:
        return None

    def sweep(self) -> None:
        return None

    def remains(self) -> list[LeaseId]:
        return []  # nothing is kept outside the processes themselves

    def _members(self, lease: LeaseId) -> list[int]:
        leaders = self._pids.get(lease, set())  # a reserve has none: its process is killed by its owner
        return processes.session_members(leaders) if leaders else []
