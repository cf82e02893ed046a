"""One executor process as its agent sees it: identity, page, and the moment of its death.

A pidfd tells the death of any process, child or not, so an adopted executor is watched like a forked one.
"""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

from isthmus.core.errors import FrameError
from isthmus.core.ids import ExecutorId
from isthmus.core.model import ExecutorInfo
from isthmus.node import processes
from isthmus.node.assignments import Exited
from isthmus.node.page import CLIENTS, CPU, EXIT_STATUS, PID, RUNNING, START_TICKS, Page


class Executor:
    """`is_reaped`: whether a zygote that we hear of will tell its exit status."""

    def __init__(self, info: ExecutorInfo, page: Page, is_reaped: Callable[[], bool] = lambda: False) -> None:
        self.info = info
        self.page = page
        self.is_reaped = is_reaped
        self.status: int | None = None  # once gone: exit code, or minus the signal; None: unknown
        self.gone = asyncio.Event()
        self.killed = False  # by order: its end is no surprise

    @classmethod
    def found(cls, path: Path) -> "Executor | None":
        """The executor whose page an earlier agent left at `path`; None when it never got as far as its
        page.
        """
        try:
            page = Page(path)
        except (OSError, FrameError):
            return None
        if not page[PID]:
            page.close()
            return None
        return cls(ExecutorInfo(executor=ExecutorId(path.stem), address=page.address, pid=page[PID]), page)

    def is_alive(self) -> bool:
        return processes.is_alive(self.info.pid, self.page[START_TICKS])

    def send_signal(self, number: signal.Signals) -> None:
        if self.is_alive():
            processes.send_signal(self.info.pid, number)

    def settle(self, exited: Exited | None) -> None:
        """Take down how it ended: as its zygote reports, else as it wrote down itself if it came to that."""
        written = self.page[EXIT_STATUS]
        if exited is not None:
            self.status, self.page[CPU] = exited.status, exited.cpu_ns
        elif written:
            self.status = written - 1
        self.page[RUNNING] = self.page[CLIENTS] = 0  # it cannot say so any more

    async def await_death(self) -> None:
        await processes.gone(self.info.pid, self.page[START_TICKS])
