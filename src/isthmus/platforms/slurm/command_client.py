"""Speak to Slurm by its own commands, wherever they run: on this machine, or on a login node by SSH.

Not here: the commands' words (`commands.py`), what is made of theirs (`parsing.py`), running them
(`running.py`, `ssh.py`).
"""

import re
from collections.abc import Mapping

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import AllocationId
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm import commands, parsing
from isthmus.platforms.slurm.client import JobSteps, RefusedError, Started
from isthmus.platforms.slurm.commands import Command
from isthmus.platforms.slurm.records import (
    GONE,
    BatchJob,
    Job,
    JobRequest,
    License,
    NodeUse,
    PoolRequest,
    Program,
    Waiting,
)
from isthmus.platforms.slurm.running import CommandFailedError, Running

_UNREACHABLE = re.compile(
    "Unable to contact|Socket timed out|Connection refused|Protocol authentication|munge"
)


class CommandClient:
    """A SlurmClient of commands with explicit formats: Slurm 20.11 and newer, no administrator needed."""

    def __init__(self, settings: SlurmSettings, running: Running) -> None:
        self._settings = settings
        self._running = running
        self.place = running.place

    @property
    def steps(self) -> JobSteps | None:
        return self

    async def script(self, job: int) -> str:
        try:
            return await self._run(commands.show_script(job))
        except CommandFailedError as error:
            if "script" in error.words:  # a job of salloc or srun has none
                return ""
            raise

    async def describe(self, job: int) -> BatchJob:
        return parsing.batch_job(job, await self._run(commands.show_job(job)))

    async def join(self, job: BatchJob, program: Program) -> Started:
        command = commands.join_job(job, program.words)
        return await self._running.start(command, program.log, program.environ)

    async def jobs(self) -> tuple[Job, ...]:
        return parsing.jobs(await self._run(commands.list_jobs(await self._running.user())))

    async def queue(self) -> tuple[Waiting, ...]:
        return parsing.queue(await self._run(commands.list_queue()))

    async def nodes(self) -> tuple[NodeUse, ...]:
        return parsing.nodes(await self._run(commands.list_nodes(self._settings)))

    async def clock_s(self) -> float:
        return parsing.clock_s(await self._run(commands.show_diagnostics()))

    async def licenses(self) -> tuple[License, ...]:
        return parsing.licenses(await self._run(commands.list_licenses()))

    async def state(self, job: int) -> tuple[str, str]:
        try:
            return parsing.shown_state(await self._run(commands.show_job(job)))
        except CommandFailedError as error:
            if "Invalid job id" in error.words:
                return GONE, ""
            raise

    async def take(self, request: JobRequest) -> int:
        command = commands.allocate(self._settings, request)
        try:
            # Our caller sets the limit of time: a job may wait in the queue for as long as it likes.
            said = await self._running.run(command, None)
        except CommandFailedError as error:
            raise _refusal(error) from error
        return parsing.granted(said.remarks)

    async def submit(self, request: PoolRequest) -> int:
        command = commands.submit(self._settings, request)
        try:
            said = await self._running.run(command, self._settings.command_timeout_s, request.environ)
        except CommandFailedError as error:
            raise _refusal(error) from error
        return parsing.submitted(said.printed)

    async def start(self, job: int, request: JobRequest) -> Started:
        program = request.program
        command = commands.start_step(job, request.resources, program.words)
        return await self._running.start(command, program.log, program.environ)

    async def cancel(self, job: int) -> None:
        await self._run(commands.cancel_job(job))

    async def cancel_named(self, allocation: AllocationId) -> None:
        await self._run(commands.cancel_named(await self._running.user(), allocation))

    async def remove(self, directory: str) -> None:
        await self._running.remove(directory)

    async def partitions(self) -> frozenset[str]:
        return frozenset((await self._run(commands.list_partitions())).split())

    async def ping(self) -> str:
        return (await self._run(commands.ping())).strip()

    async def configuration(self) -> Mapping[str, str]:
        return parsing.configuration(await self._run(commands.show_configuration()))

    async def close(self) -> None:
        await self._running.close()

    async def _run(self, command: Command) -> str:
        return (await self._running.run(command, self._settings.command_timeout_s)).printed


def _refusal(error: CommandFailedError) -> SiteUnavailableError:
    """What a command's failure means: Slurm said no, or it was not reached, or nobody knows."""
    if not error.words:
        return error
    if _UNREACHABLE.search(error.words):
        return SiteUnavailableError(f"Slurm cannot be reached: {error}")
    return RefusedError(str(error))
