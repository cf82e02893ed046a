"""What Slurm holds now, read at most once per tick however many ask.

Invariant: a reading that fails raises and replaces nothing. Each reading carries the moment it began, so that
what happened later is not taken for missing in it.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

import msgspec
import structlog

from isthmus.core.errors import SiteUnavailableError
from isthmus.platforms.slurm import reasons
from isthmus.platforms.slurm.client import SlurmClient
from isthmus.platforms.slurm.records import Job, License, NodeUse

FATE_TRIES = 9  # looks at a job that Slurm is still ending
FATE_PAUSE_S = 0.12

T = TypeVar("T")
_log = structlog.get_logger("platforms.slurm")
CLOCK_S = 3600.0  # how often the clocks are compared
NONE_S = 60.0  # how often a cluster that counts no licences is asked for them


class Reading(NamedTuple, Generic[T]):
    """`began_at` is `time.monotonic()` seconds."""

    rows: tuple[T, ...]
    began_at: float


class _Cached(Generic[T]):
    def __init__(self, read: Callable[[], Awaitable[tuple[T, ...]]], life_s: float) -> None:
        self._read = read
        self._life_s = life_s
        self._lock = asyncio.Lock()
        self._latest: Reading[T] | None = None

    @property
    def latest(self) -> Reading[T] | None:
        return self._latest

    async def get(self, not_before: float) -> Reading[T]:
        """A reading of this tick that began after `not_before`; whoever asks meanwhile waits for the same."""
        async with self._lock:
            latest = self._latest
            now = time.monotonic()
            if latest is None or now - latest.began_at >= self._life_s or latest.began_at < not_before:
                latest = self._latest = Reading(await self._read(), now)
            return latest


class Watch:
    """The one reader of Slurm's books. Times in them are made ours: slurmctld's clock may differ."""

    def __init__(self, client: SlurmClient, tick_s: float) -> None:
        self._client = client
        self._ahead_s = 0.0  # slurmctld's clock, of ours
        self._compared_at = float("-inf")
        self._settling: dict[int, asyncio.Task[tuple[str, str]]] = {}
        self._jobs = _Cached(self._read_jobs, tick_s / 2)
        self._nodes = _Cached(client.nodes, tick_s / 2)
        self._licenses = _Cached(client.licenses, tick_s / 2)

    async def jobs(self, not_before: float = 0.0) -> Reading[Job]:
        """Raises SiteUnavailableError."""
        return await self._jobs.get(not_before)

    async def _read_jobs(self) -> tuple[Job, ...]:
        rows = await self._client.jobs()
        if rows and time.monotonic() - self._compared_at >= CLOCK_S:
            await self._compare_clocks()
        return tuple(msgspec.structs.replace(job, ends_s=job.ends_s - self._ahead_s) for job in rows)

    async def _compare_clocks(self) -> None:
        self._compared_at = time.monotonic()
        try:
            self._ahead_s = await self._client.clock_s() - time.time()
        except SiteUnavailableError as error:
            _log.warning("slurmctld's clock cannot be read; it is taken for ours", why=str(error))

    async def nodes(self, not_before: float = 0.0) -> Reading[NodeUse]:
        """Raises SiteUnavailableError."""
        return await self._nodes.get(not_before)

    async def licenses(self) -> Reading[License]:
        """Raises SiteUnavailableError."""
        latest = self._licenses.latest
        if latest is not None and not latest.rows and time.monotonic() - latest.began_at < NONE_S:
            return latest
        return await self._licenses.get(0.0)

    async def settled(self, job: int) -> tuple[str, str]:
        """A job's state and reason, once Slurm has ended what it is ending, or after a while in any case.
        Whoever asks meanwhile waits for the same. Raises SiteUnavailableError.
        """
        settling = self._settling.get(job)
        if settling is None:
            settling = asyncio.create_task(self._settle(job), name=f"platforms.slurm.settle {job}")
            self._settling[job] = settling
            settling.add_done_callback(lambda _: self._settling.pop(job))
        return await asyncio.shield(settling)  # who leaves does not leave the others without an answer

    async def _settle(self, job: int) -> tuple[str, str]:
        for _ in range(FATE_TRIES):
            state, reason = await self._client.state(job)
            if state != "COMPLETING":
                break
            await asyncio.sleep(FATE_PAUSE_S)
        return state, reason


async def gone(client: SlurmClient, job: int, timeout_s: float) -> bool:
    """Whether Slurm has ended all that ran in it, within the time. Raises SiteUnavailableError."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while (await client.state(job))[0] in reasons.HOLDING:
                await asyncio.sleep(FATE_PAUSE_S)
            return True
    return False
