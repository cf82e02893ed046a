"""Run Slurm's commands: a few at a time, each with a time limit. Here on this machine; over SSH is to follow.

Not here: which commands (`commands.py`).
"""

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from isthmus.core.errors import SiteUnavailableError
from isthmus.platforms.slurm import commands
from isthmus.platforms.slurm.commands import Command

CONCURRENCY_MAX = 8  # commands at once: more would only queue up in slurmctld
END_S = 2.0  # for a command that is told to end


class CommandFailedError(SiteUnavailableError):
    """`words`: what it said. The command may or may not have had its effect."""

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(message)
        self.words = words


class Running(Protocol):
    """A place where Slurm's commands can be run."""

    async def run(self, command: Command, timeout_s: float) -> str:
        """What it printed, both streams. Raises CommandFailedError: missing, too slow, or exit code not 0."""
        ...

    async def start(self, command: Command, log: Path, environ: Mapping[str, str]) -> "Started":
        """Start a command that stays, in a session of its own, so that it survives us."""
        ...


class Started(Protocol):
    async def wait(self) -> int: ...


class RunningHere:
    """On this machine, in the environment that `commands.environment` makes."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(CONCURRENCY_MAX)

    async def run(self, command: Command, timeout_s: float) -> str:
        async with self._slots:
            process = await _spawn(command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
            try:
                async with asyncio.timeout(timeout_s):
                    printed, _ = await process.communicate()
            except TimeoutError as error:
                raise CommandFailedError(f"{command[0]} did not answer in {timeout_s:g} s") from error
            finally:
                await _end(process)
        words = printed.decode("utf-8", "replace")
        if process.returncode:
            raise CommandFailedError(f"{command[0]} failed: {_last_line(words)}", words)
        return words

    async def start(
        self, command: Command, log: Path, environ: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return await _spawn(command, environ, stdout=output, stderr=output, start_new_session=True)


async def _spawn(
    command: Command, environ: Mapping[str, str] | None = None, **streams: object
) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env={**commands.environment(), **(environ or {})},
            **streams,  # type: ignore[arg-type]
        )
    except OSError as error:
        raise CommandFailedError(
            f"{command[0]} cannot be run here ({error.strerror}); `isthmus doctor` says what is missing"
        ) from error


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM lets salloc give its request back; then SIGKILL."""
    for stop in (process.terminate, process.kill):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await process.wait()


def _last_line(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
