"""One lease on this node: what is written down of it, its executors, and why it came to its end.

Not here: acts on leases (`hosting.py`), new executors (`seating.py`).
"""

import asyncio
import logging
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from isthmus.core.ids import ExecutorId, LeaseId
from isthmus.core.kinds import HeldBy, of_node
from isthmus.core.model import EndReason
from isthmus.node.isolation import Isolation, Share
from isthmus.node.logs import Log
from isthmus.node.page import Page
from isthmus.node.processes import describe_exit
from isthmus.node.records import LeaseRecord
from isthmus.node.running import Executor

log = logging.getLogger("isthmus.agent")


class Hosted:
    """One lease: its record, its executors (dead ones keep their page), and what is being done to it."""

    def __init__(self, record: LeaseRecord, directory: Path, log: Log) -> None:
        self.record = record
        self.directory = directory
        self.log = log
        self.executors: dict[ExecutorId, Executor] = {}
        self.ended_pages: list[Page] = []
        self.deadline_ns = record.deadline_ns
        self.lock = asyncio.Lock()
        self.ending = False
        self.frozen_ns = 0  # since when; 0: it runs
        self.oom_kills = 0  # those already told

    @property
    def lease(self) -> LeaseId:
        return self.record.lease

    @property
    def pages(self) -> list[Page]:
        return [*self.ended_pages, *(executor.page for executor in self.executors.values())]

    @property
    def share(self) -> Share:
        """What it holds of the node."""
        resources = self.record.resources
        idle_cores = resources.cores if self.record.is_harvested else 0
        amounts = tuple(of_node(resources.amounts).items())
        return Share(self.record.cores, resources.memory_bytes, idle_cores, amounts)

    def trim_log(self) -> None:
        try:
            self.log.trim()
        except OSError as error:
            log.warning("the output of %s cannot be cut: %s", self.lease, error)

    def cause(self, executor: Executor, isolation: Isolation) -> tuple[EndReason, str]:
        """Why this executor of it died."""
        from_outside = executor.status in (-signal.SIGKILL, None)
        oom_kills = isolation.oom_kills(self.lease)
        if oom_kills > self.oom_kills and from_outside:
            self.oom_kills = oom_kills
            limit = self.record.resources.memory
            return EndReason.OUT_OF_MEMORY, f"it went over the lease's memory of {limit} and was killed"
        if executor.killed:
            return EndReason.EXITED, "killed on request"
        if time.monotonic_ns() > self.deadline_ns and from_outside:
            return EndReason.EXPIRED, "nobody renewed it, and its executor ended itself"
        return EndReason.KILLED if from_outside else EndReason.EXITED, describe_exit(executor.status)


def enforced(isolation: Isolation, amounts: Mapping[str, int]) -> dict[str, HeldBy]:
    """How each of these kinds is held on this node."""
    held = isolation.enforcement.amounts
    return {kind: held.get(kind, "accounted-only") for kind in amounts}
