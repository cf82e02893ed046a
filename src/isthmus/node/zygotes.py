"""The agent's side of zygotes: one per environment, each with spare executors forked ahead of need.

Invariant: an executor that is handed out by `take` is alive, has opened its fabric, and belongs to no lease.
Not here: the zygote process itself (`zygote.py`), what an environment needs on disk (`environments.py`).
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from isthmus.core.errors import FunctionLoadError, IsthmusError, NoCapacityError
from isthmus.core.ids import EnvironmentId
from isthmus.core.model import Environment, python_version
from isthmus.fabric.frames import CODEC_VERSION
from isthmus.node import assignments
from isthmus.node.assignments import (
    Assignment,
    Broken,
    Exited,
    Fork,
    Forked,
    Packet,
    Preparation,
    Ready,
    Started,
)
from isthmus.node.idling import make_modest
from isthmus.node.isolation import Isolation, reserve_name
from isthmus.node.processes import gone, readable, send_signal

START_ATTEMPTS = 3
START_S = 60.0  # imports of a preload may be slow on a shared file system
FORK_S = 30.0  # for one fork, and for its first words; long only on a machine that swaps
SPARES_MAX = 16
DISMISS_S = 3.0  # for a spare to end by itself
_SECRETS = ("ISTHMUS_",)  # no variable of ours reaches user code, except those an assignment sets
IDLE_S = 600.0  # a zygote costs some 40 MB; starting one anew, some hundred milliseconds
ZYGOTES_MAX = 16  # beyond it, those that nobody uses are stopped, the longest unused first
_KEEP_EXITS = 1024
_ZYGOTE_DEATHS_MAX = 3  # in a row, for one fork


log = logging.getLogger("isthmus.agent")


class Spare(NamedTuple):
    """An unassigned executor. `is_reaped`: whether its zygote still lives, and will report its exit."""

    pid: int
    control: socket.socket
    is_reaped: Callable[[], bool]

    async def assign(self, assignment: Assignment) -> str:
        """Make it an executor of this lease; gives the address it listens at. Raises IsthmusError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(FORK_S):
                await loop.sock_sendall(self.control, assignments.pack(assignment))
                packet = _unpack(await loop.sock_recv(self.control, assignments.PACKET_BYTES_MAX))
        except (OSError, TimeoutError) as error:
            raise IsthmusError(f"executor {self.pid} did not take its lease: {error!r}") from error
        finally:
            self.control.close()
        if isinstance(packet, Ready):
            return packet.address
        raise IsthmusError(
            packet.message if isinstance(packet, Broken) else f"executor {self.pid} died at its start"
        )

    def discard(self) -> None:
        self.control.close()
        send_signal(self.pid, signal.SIGKILL)

    async def dismiss(self) -> None:
        """Let it end by itself: killed just when it opens its fabric, it would leave shared memory behind."""
        self.control.close()
        try:
            async with asyncio.timeout(DISMISS_S):
                await gone(self.pid)
        except TimeoutError:
            send_signal(self.pid, signal.SIGKILL)


class Exits:
    """Exit statuses as zygotes report them, for whoever asks, before or after."""

    def __init__(self) -> None:
        self._known: dict[int, Exited] = {}
        self._asked: dict[int, asyncio.Future[Exited]] = {}

    def put(self, exited: Exited) -> None:
        asked = self._asked.pop(exited.pid, None)
        if asked is not None and not asked.done():
            asked.set_result(exited)
            return
        self._known[exited.pid] = exited
        while len(self._known) > _KEEP_EXITS:
            self._known.pop(next(iter(self._known)))

    async def get(self, pid: int, timeout_s: float) -> Exited | None:
        if pid in self._known or timeout_s <= 0:
            return self._known.pop(pid, None)
        future = self._asked.setdefault(pid, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            self._asked.pop(pid, None)
            return None


class Zygote:
    """One zygote process and its spares."""

    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, exits: Exits, isolation: Isolation
    ) -> None:
        self.process = process
        self._isolation = isolation
        self.wanted_spares = 0
        self._control = control
        self._exits = exits
        self._spares: deque[Spare] = deque()
        self._forks: deque[asyncio.Future[Spare]] = deque()
        self._reader = asyncio.create_task(self._read(), name=f"zygote-{process.pid}")
        self._refills: set[asyncio.Task[None]] = set()
        self.dead = False

    async def take(self) -> Spare:
        """A spare if there is one, else a fresh fork. Raises NoCapacityError when forking fails."""
        while self._spares:
            spare = self._spares.popleft()
            if _is_open(spare.control):
                return spare
            await self._dismiss(spare)
        try:
            async with asyncio.timeout(FORK_S):
                return await self._order_fork()
        except TimeoutError as error:
            raise NoCapacityError(f"zygote {self.process.pid} did not fork within {FORK_S:.0f} s") from error

    def refill(self) -> None:
        """Order as many forks as spares are missing."""
        if self.dead:
            return
        for _ in range(self.wanted_spares - len(self._spares) - len(self._refills)):
            task = asyncio.create_task(self._add_spare(), name=f"spare-of-{self.process.pid}")
            self._refills.add(task)
            task.add_done_callback(self._refills.discard)

    async def shrink(self) -> None:
        while len(self._spares) > self.wanted_spares:
            await self._dismiss(self._spares.pop())

    async def stop(self) -> None:
        """End it and its spares; executors with a lease live on."""
        self.wanted_spares = 0
        for task in list(self._refills):
            await task
        await self.shrink()
        self._reader.cancel()
        self._bury()
        await asyncio.to_thread(self.process.wait)

    def _order_fork(self) -> asyncio.Future[Spare]:
        future: asyncio.Future[Spare] = asyncio.get_running_loop().create_future()
        self._forks.append(future)
        try:
            self._control.send(assignments.pack(Fork()))
        except OSError as error:
            self._forks.pop()
            future.set_exception(NoCapacityError(f"the zygote is gone: {error}"))
        return future

    async def _add_spare(self) -> None:
        try:
            spare = await self._order_fork()
        except NoCapacityError as error:
            log.warning("no spare executor: %s", error)
            return
        try:
            await asyncio.to_thread(self._isolation.reserve, spare.pid)
        except OSError as error:
            log.warning("spare executor %d has no group of its own: %s", spare.pid, error)
        self._spares.append(spare)
        await self.shrink()  # it may have been dismissed, or orphaned, meanwhile

    async def _dismiss(self, spare: Spare) -> None:
        await spare.dismiss()
        await asyncio.to_thread(self._isolation.destroy, reserve_name(spare.pid))

    async def _read(self) -> None:
        while True:
            await readable(self._control.fileno())
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, assignments.PACKET_BYTES_MAX, 1)
            except ConnectionError:
                data = b""
            if not data:
                self._bury()
                await self.shrink()
                await asyncio.to_thread(self.process.wait)
                return
            self._handle(_unpack(data), descriptors)

    def _handle(self, packet: Packet | None, descriptors: list[int]) -> None:
        match packet:
            case Forked(pid=pid) if descriptors:
                control = socket.socket(fileno=descriptors[0])
                control.setblocking(False)
                self._settle(Spare(pid, control, lambda: not self.dead))
            case Exited():
                self._exits.put(packet)
            case Broken(message=message):
                self._settle(NoCapacityError(message))

    def _settle(self, outcome: Spare | IsthmusError) -> None:
        future = self._forks.popleft() if self._forks else None
        if future is None or future.done():
            if isinstance(outcome, Spare):
                outcome.discard()
        elif isinstance(outcome, Spare):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _bury(self) -> None:
        self.dead = True
        self.wanted_spares = 0
        self._control.close()
        while self._forks:
            self._settle(NoCapacityError(f"zygote {self.process.pid} died before it could fork"))


class Zygotes:
    """All zygotes of this node, started at the first need of their environment."""

    def __init__(
        self,
        fabric: str,
        log_file: Path,
        isolation: Isolation,
        variables: dict[str, str] | None = None,
        is_modest: bool = False,
    ) -> None:
        """
        variables  for the environment of executors; what is set here already goes before them
        is_modest  the cores are somebody else's; take little of them for getting ready
        """
        self._is_modest = is_modest
        self.exits = Exits()
        self._fabric = fabric
        self._log_file = log_file
        self._isolation = isolation
        self._variables = variables or {}
        self._zygotes: dict[EnvironmentId, asyncio.Task[Zygote]] = {}
        self._used_s: dict[EnvironmentId, float] = {}

    async def take(self, environment: Environment, python: str, spares: int) -> Spare:
        """An unassigned executor of this environment. Raises FunctionLoadError, NoCapacityError."""
        self._used_s[environment.id] = time.monotonic()
        for _ in range(_ZYGOTE_DEATHS_MAX):
            zygote = await self.zygote(environment, python)
            zygote.wanted_spares = max(zygote.wanted_spares, spares)
            try:
                return await zygote.take()
            except NoCapacityError:
                if not zygote.dead:
                    raise
        raise NoCapacityError(f"the zygotes of {environment.id} keep dying; see the agent's log")

    async def zygote(self, environment: Environment, python: str) -> Zygote:
        task = self._zygotes.get(environment.id)
        if task is None or (task.done() and self._ready(environment.id) is None):
            task = asyncio.create_task(self._start(environment, python), name=f"start-{environment.id}")
            self._zygotes[environment.id] = task
        return await asyncio.shield(task)

    async def warm(self, environment: Environment, python: str, spares: int) -> None:
        zygote = await self.zygote(environment, python)
        zygote.wanted_spares = min(spares, SPARES_MAX)
        await zygote.shrink()
        zygote.refill()

    async def stop(self, environment: EnvironmentId) -> None:
        """End a zygote, even one that is just starting."""
        zygote = self._ready(environment)
        task = self._zygotes.pop(environment, None)
        self._used_s.pop(environment, None)
        if zygote is not None:
            await zygote.stop()
        elif task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def refill(self, environment: EnvironmentId) -> None:
        zygote = self._ready(environment)
        if zygote is not None:
            zygote.refill()

    def idle(self, in_use: set[EnvironmentId], now_s: float) -> list[EnvironmentId]:
        """Environments that nobody needed for IDLE_S, or too many; the one that keeps the agent warm is not
        among them."""
        unused = sorted(
            (used_s, environment)
            for environment, used_s in self._used_s.items()
            if environment in self._zygotes and environment not in in_use and environment != Environment().id
        )
        excess = len(self._zygotes) - ZYGOTES_MAX
        return [
            environment
            for place, (used_s, environment) in enumerate(unused)
            if place < excess or now_s - used_s > IDLE_S
        ]

    def _ready(self, environment: EnvironmentId) -> Zygote | None:
        task = self._zygotes.get(environment)
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return None
        return None if task.result().dead else task.result()

    async def close(self) -> None:
        for environment in list(self._zygotes):
            await self.stop(environment)

    async def _start(self, environment: Environment, python: str) -> Zygote:
        """Raises FunctionLoadError. One that is killed at its start gets another try: it did not do that."""
        for _ in range(START_ATTEMPTS - 1):
            with contextlib.suppress(_KilledError):
                return await self._launch(environment, python)
        return await self._launch(environment, python)

    async def _launch(self, environment: Environment, python: str) -> Zygote:
        ours, theirs = assignments.pair()
        preparation = Preparation(
            sys_path=environment.sys_path, preload=environment.preload, fabric=self._fabric
        )
        command = [
            python, "-m", "isthmus.node.zygote", str(theirs.fileno()), assignments.pack(preparation).hex(),
        ]  # fmt: skip
        with theirs, self._log_file.open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[theirs.fileno()],
                env={**self._variables, **_clean_environment()}, start_new_session=True,
            )  # fmt: skip
        ours.setblocking(False)
        if self._is_modest:
            make_modest(process.pid)
        try:
            await _await_start(ours, process)
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            raise
        return Zygote(process, ours, self.exits, self._isolation)


class _KilledError(FunctionLoadError):
    """A signal ended the interpreter before it was ready."""


async def _await_start(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    try:
        async with asyncio.timeout(START_S):
            data = await asyncio.get_running_loop().sock_recv(control, assignments.PACKET_BYTES_MAX)
    except TimeoutError as error:
        raise FunctionLoadError(f"the environment was not ready after {START_S:.0f} s") from error
    match _unpack(data):
        case Started(python=python, codec_version=codec):
            if (python, codec) != (python_version(), CODEC_VERSION):
                raise FunctionLoadError(
                    f"the environment has {python} with codec {codec}, the agent has {python_version()} "
                    f"with codec {CODEC_VERSION}; code cannot be exchanged between them"
                )
        case Broken(message=message):
            raise FunctionLoadError(message)
        case _:
            status = process.wait()
            kind = _KilledError if status < 0 else FunctionLoadError
            raise kind(
                f"the environment's interpreter ended at its start with status {status}; see the agent's log"
            )


def default_python() -> str:
    return sys.executable


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)}


def _unpack(data: bytes) -> Packet | None:
    try:
        return assignments.unpack(data)
    except msgspec.MsgspecError:
        return None


def _is_open(control: socket.socket) -> bool:
    """Whether the spare at the other end still lives: it says nothing before it is assigned."""
    try:
        return control.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
