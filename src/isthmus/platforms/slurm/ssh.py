"""Run Slurm's commands on a login node, through one SSH connection that comes back after a cut.

    connection ─ a session for each command, a few at a time
               ├ one session, the keeper: a shell that starts all agents' steps and tells their ends
               └ the tunnel, if one is set: a port there, where agents dial the site

Who we are, which keys, jump hosts and known hosts: all as OpenSSH's own configuration says. A host key that
is not known, or has changed, is refused. Scripts go through a shell's standard input: nothing secret is on a
command line, and any login shell will do.
Invariant: a cut says nothing about what runs over there; steps go on without us.
Not here: which commands (`commands.py`).
"""

import asyncio
import contextlib
import shlex
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import asyncssh
import structlog

from isthmus.core.settings import SshSettings
from isthmus.platforms.slurm.commands import Command
from isthmus.platforms.slurm.running import CONCURRENCY_MAX, CommandFailedError, Said, failure, silence

RETRY_S = 1.0  # after a failed connection all who ask are told the same for so long
CLOSE_S = 2.0  # for a connection to say good-bye
TUNNEL_RETRY_S = 10.0
KEEPALIVES_MAX = 3  # without an answer; then the connection counts as cut
_FOREIGN = "SALLOC_*|SBATCH_*|SCANCEL_*|SINFO_*|SQUEUE_*|SLURM_*"
_PRELUDE = (
    "for name in $(env | sed -n 's/^\\([A-Z_]*\\)=.*/\\1/p'); do "
    f"case $name in SLURM_CONF) ;; {_FOREIGN}) unset $name ;; esac; done\n"
    "export SLURM_TIME_FORMAT=%s LC_ALL=C.UTF-8\n"
)

_log = structlog.get_logger("platforms.slurm")


class _Step:
    """A program that was started over there."""

    def __init__(self, ended: asyncio.Future[int]) -> None:
        self._ended = ended

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)


class RunningBySsh:
    """site_url: where the site listens, for the tunnel."""

    def __init__(self, settings: SshSettings, site_url: str = "") -> None:
        self.place = f"{settings.host} by SSH"
        self._settings = settings
        self._site_url = site_url
        self._slots = asyncio.Semaphore(CONCURRENCY_MAX)
        self._connecting = asyncio.Lock()
        self._connection: asyncssh.SSHClientConnection | None = None
        self._failed: tuple[float, str] = (float("-inf"), "")
        self._tunnel: asyncssh.SSHListener | None = None
        self._dig_at = float("-inf")
        self._keeping = asyncio.Lock()
        self._keeper: _Keeper | None = None
        self._user = ""

    async def user(self) -> str:
        if not self._user:
            self._user = (await self.run(("id", "-un"), self._settings.connect_s)).printed.strip()
        return self._user

    async def run(
        self, command: Command, timeout_s: float | None, environ: Mapping[str, str] | None = None
    ) -> Said:
        async with self._slots:
            try:
                async with asyncio.timeout(timeout_s):
                    said, code = await self._converse(await self._connected(), command, environ or {})
            except TimeoutError as error:
                raise silence(command, timeout_s) from error
            except (asyncssh.Error, OSError) as error:
                raise CommandFailedError(f"{command[0]}: {self._say(error)}") from error
        if code is None:
            raise CommandFailedError(
                f"the SSH connection to {self._settings.host} was cut during {command[0]}; "
                "what it did there is not known"
            )
        if code == 127:
            raise CommandFailedError(
                f"{command[0]} is not on PATH on {self._settings.host}; see slurm.ssh.setup"
            )
        if code:
            raise failure(command, said)
        return said

    async def _converse(
        self, connection: asyncssh.SSHClientConnection, command: Command, environ: Mapping[str, str]
    ) -> tuple[Said, int | None]:
        """Its words and exit code; None when the connection was cut."""
        process = await self._shell(connection)
        try:
            script = f"{self._prelude()}{_exports(environ)}exec {shlex.join(command)} </dev/null\n"
            printed, remarks = await process.communicate(script)
            return Said(str(printed or ""), str(remarks or "")), process.returncode
        finally:
            if process.returncode is None:
                with contextlib.suppress(asyncssh.Error, OSError):
                    process.terminate()  # lets salloc give its request back
            process.close()

    async def start(self, command: Command, log: str, environ: Mapping[str, str]) -> _Step:
        connection = await self._connected()
        try:
            async with self._keeping:
                if self._keeper is None or self._keeper.is_over:
                    self._keeper = _Keeper(await self._shell(connection), self._prelude())
                return self._keeper.start(command, log, environ)
        except (asyncssh.Error, OSError) as error:
            raise CommandFailedError(f"{command[0]}: {self._say(error)}") from error

    async def remove(self, directory: str) -> None:
        await self.run(("rm", "-rf", "--", directory), self._settings.connect_s)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await connection.wait_closed()
            connection.abort()
        if self._keeper is not None:
            await self._keeper.close()

    def _prelude(self) -> str:
        return f"{_PRELUDE}{self._settings.setup}\n"

    async def _shell(self, connection: asyncssh.SSHClientConnection) -> asyncssh.SSHClientProcess[str]:
        return await connection.create_process("sh -s", errors="replace")

    # the connection -----------------------------------------------------------------------------------------
    async def _connected(self) -> asyncssh.SSHClientConnection:
        """The one connection, made anew after a cut. Raises CommandFailedError."""
        async with self._connecting:
            if self._connection is None or self._connection.is_closed():
                self._connection, self._tunnel, self._dig_at = await self._connect(), None, 0.0
            is_wanted = self._settings.tunnel and self._site_url and self._tunnel is None
            if is_wanted and time.monotonic() >= self._dig_at:
                self._dig_at = time.monotonic() + TUNNEL_RETRY_S
                self._tunnel = await self._dig(self._connection)
            return self._connection

    async def _connect(self) -> asyncssh.SSHClientConnection:
        failed_at, why = self._failed
        if time.monotonic() - failed_at < RETRY_S:
            raise CommandFailedError(why)
        settings = self._settings
        options = {"config": [settings.config]} if settings.config else {}
        try:
            async with asyncio.timeout(settings.connect_s):
                return await asyncssh.connect(
                    settings.host,
                    keepalive_interval=settings.keepalive_s,
                    keepalive_count_max=KEEPALIVES_MAX,
                    password_auth=False,
                    kbdint_auth=False,
                    **options,
                )
        except (asyncssh.Error, asyncssh.ConfigParseError, asyncssh.KeyImportError, OSError) as error:
            why = self._say(error)
            if isinstance(error, TimeoutError):
                why = f"{settings.host} did not answer in {settings.connect_s:g} s (SSH)"
            self._failed = time.monotonic(), why
            raise CommandFailedError(why) from error

    async def _dig(self, connection: asyncssh.SSHClientConnection) -> asyncssh.SSHListener | None:
        """The tunnel, or None: our last connection may hold the port for a while, so it is tried again."""
        host, _, port = self._settings.tunnel.rpartition(":")
        site = urlsplit(self._site_url)
        try:
            return await connection.forward_remote_port(host, int(port), site.hostname or "", site.port or 80)
        except (asyncssh.Error, OSError) as error:
            _log.error(
                "the login node does not listen for agents; its sshd needs `GatewayPorts clientspecified`",
                tunnel=self._settings.tunnel,
                why=str(error),
            )
            return None

    def _say(self, error: Exception) -> str:
        host = self._settings.host
        match error:
            case asyncssh.HostKeyNotVerifiable():
                return f"the host key of {host} is not known or has changed; check it, run `ssh {host}` once"
            case asyncssh.PermissionDenied():
                return f"{host} refuses our SSH keys; `ssh {host}` must work without a question"
            case asyncssh.ConnectionLost():
                return f"the SSH connection to {host} was cut; what runs there goes on"
        return f"{host} cannot be reached by SSH: {error}"


class _Keeper:
    """A shell over there that starts steps in sessions of their own and says `number code` when one ends.

    One session for all of them: sshd allows a connection ten (MaxSessions).
    """

    def __init__(self, shell: asyncssh.SSHClientProcess[str], prelude: str) -> None:
        self._shell = shell
        self._steps: dict[int, asyncio.Future[int]] = {}
        self._count = 0
        shell.stdin.write(f"exec 2>&1\n{prelude}")
        self._listening = asyncio.create_task(self._listen(), name="platforms.slurm.keeper")

    @property
    def is_over(self) -> bool:
        return self._listening.done()

    def start(self, command: Command, log: str, environ: Mapping[str, str]) -> _Step:
        self._count += 1
        ended = self._steps[self._count] = asyncio.get_running_loop().create_future()
        self._shell.stdin.write(step_script(self._count, command, log, environ))
        return _Step(ended)

    async def close(self) -> None:
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self) -> None:
        try:
            async for line in self._shell.stdout:
                number, _, code = line.strip().partition(" ")
                step = self._steps.pop(int(number), None) if number.isdecimal() else None
                if step is None or not code.isdecimal():
                    _log.warning("the login node said something else", words=line.strip())
                elif not step.done():
                    step.set_result(int(code))
        except (asyncssh.Error, OSError) as error:
            _log.warning("the SSH connection was cut; agents go on", why=str(error))
        finally:
            for step in self._steps.values():
                if not step.done():
                    step.set_exception(CommandFailedError("SSH was cut: nobody tells whether the step runs"))
                    step.exception()  # seen: nobody needs to wait for it
            self._steps.clear()


def step_script(number: int, command: Command, log: str, environ: Mapping[str, str]) -> str:
    """Shell that starts a program which outlives it, and tells the step's number and exit code at its end."""
    directory = shlex.quote(log.rpartition("/")[0] or ".")
    program = f"exec setsid {shlex.join(command)} >>{shlex.quote(log)} 2>&1 </dev/null"
    return f'{{ mkdir -p {directory}; ( {_exports(environ)}{program} ); echo "{number} $?"; }} </dev/null &\n'


def _exports(environ: Mapping[str, str]) -> str:
    return "".join(f"export {name}={shlex.quote(value)}; " for name, value in environ.items())
