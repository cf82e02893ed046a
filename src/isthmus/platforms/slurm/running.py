"""Run Slurm's commands on this machine: a few at a time, each with a time limit.

Not here: which commands (`commands.py`), the same on a login node (`ssh.py`).
"""

import asyncio
import contextlib
import getpass
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from isthmus.core.errors import SiteUnavailableError
from isthmus.platforms.slurm import commands
from isthmus.platforms.slurm.client import Started
from isthmus.platforms.slurm.commands import Command

CONCURRENCY_MAX = 8  # commands at once: more would only queue up in slurmctld
END_S = 2.0  # for a command that is told to end
KILL_S = 10.0  # for one that is made to


class CommandFailedError(SiteUnavailableError):
    """`words`: what it said. The command may or may not have had its effect."""

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(message)
        self.words = words


class Said(NamedTuple):
    """What a command that succeeded printed, and what it remarked: warnings make no list unreadable."""

    printed: str
    remarks: str


class Running(Protocol):
    """A place where Slurm's commands can be run. Failures: CommandFailedError."""

    place: str

    async def user(self) -> str:
        """Whose jobs they are there."""
        ...

    async def run(
        self, command: Command, timeout_s: float | None, environ: Mapping[str, str] | None = None
    ) -> Said:
        """Raises CommandFailedError: missing, too slow, or exit code not 0."""
        ...

    async def start(self, command: Command, log: str, environ: Mapping[str, str]) -> Started:
        """Start a command that stays, in a session of its own, so that it survives us."""
        ...

    async def remove(self, directory: str) -> None: ...

    async def close(self) -> None: ...


class RunningHere:
    """On this machine, in the environment that `commands.environment` makes."""

    place = "here"

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(CONCURRENCY_MAX)

    async def user(self) -> str:
        return getpass.getuser()

    async def run(
        self, command: Command, timeout_s: float | None, environ: Mapping[str, str] | None = None
    ) -> Said:
        async with self._slots:
            process = await _spawn(
                command, environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            try:
                async with asyncio.timeout(timeout_s):
                    streams = await process.communicate()
            except TimeoutError as error:
                raise silence(command, timeout_s) from error
            finally:
                await _end(process)
        said = Said(*(stream.decode("utf-8", "replace") for stream in streams))
        if process.returncode:
            raise failure(command, said)
        return said

    async def start(
        self, command: Command, log: str, environ: Mapping[str, str]
    ) -> asyncio.subprocess.Process:
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            return await _spawn(command, environ, stdout=output, stderr=output, start_new_session=True)

    async def remove(self, directory: str) -> None:
        shutil.rmtree(directory, ignore_errors=True)

    async def close(self) -> None:
        """Nothing to close: what was started stays."""


def silence(command: Command, timeout_s: float | None) -> CommandFailedError:
    """Of a command that does not end in its time, as all of Slurm's do when slurmctld or munge is down."""
    return CommandFailedError(
        f"{command[0]} did not answer in {timeout_s:g} s; slurmctld or munge may be down"
    )


def failure(command: Command, said: Said) -> CommandFailedError:
    """Of a command whose exit code was not 0."""
    words = said.printed + said.remarks
    return CommandFailedError(f"{command[0]} failed: {_last_line(words)}", words or "it said nothing")


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
    for stop, patience_s in ((process.terminate, END_S), (process.kill, KILL_S)):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await process.wait()


def _last_line(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
