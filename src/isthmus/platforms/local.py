"""This machine as the only node: an agent process beside the site, kept alive; allocations are rows in
memory.

The agent outlives a site that is killed, so that leases go on; the next site finds it by `agent.json` in the
state directory and takes it over if it dials the same address, else replaces it (a new agent adopts running
executors). After `close` neither the agent nor anything in its process group is left.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog

from isthmus.core.api import PoolReport
from isthmus.core.discovery import is_alive
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.kinds import Stock
from isthmus.core.model import LeaseClass, Node, Record, Resources
from isthmus.core.settings import Settings
from isthmus.node.launching import agent_url, agent_words, secrets
from isthmus.node.processes import readable
from isthmus.platforms import capacity
from isthmus.platforms.bookings import Bookings
from isthmus.platforms.platform import Allocation, AllocationState

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 10.0
STEADY_S = 60.0  # an agent that lived this long starts again without a pause
STOP_S = 8.0  # for the agent to end its executors, before it is killed with its group
POLL_S = 0.5  # how often an adopted agent (not our child) is looked at, where the kernel has no pidfd
LOG_BYTES_MAX = 16 * 2**20

_log = structlog.get_logger("platforms.local")


class AgentFile(Record, frozen=True):
    """`agent.json`: the agent started last. `started` tells it from a later process of that id."""

    pid: int
    started: int
    url: str


class LocalPlatform:
    """
    site_url  where the agent dials, http://HOST:PORT
    join_key  what agent and site prove to each other that they hold
    parent    the agent ends with this process; 0: it outlives the site
    is_ephemeral  the agent removes the state directory if it is the last to leave
    """

    name = "local"
    survey_s = 10.0

    def __init__(
        self, settings: Settings, state: Path, site_url: str, join_key: bytes, parent: int = 0,
        is_ephemeral: bool = False,
    ) -> None:  # fmt: skip
        self._settings = settings.node
        self._cache = settings.cache_path
        self._state = state
        self._agent_url = agent_url(site_url)
        self._join_key = join_key
        self._parent = parent
        self._is_ephemeral = is_ephemeral
        node = Node(
            node=NodeId(socket.gethostname() or "local"),
            platform=self.name,
            cores=capacity.cores(settings.node),
            memory_bytes=capacity.memory_bytes(settings.node),
            amounts=settings.node.amounts,
        )
        self._bookings = Bookings((node,), settings.leasing.licenses)
        self._supervising: asyncio.Task[None] | None = None
        self._pid = 0

    @property
    def agent_pid(self) -> int:
        """The agent that runs now; 0 between two of them."""
        return self._pid

    async def start(self) -> None:
        if self._supervising is None:
            adopted = self._find_agent()
            self._supervising = asyncio.create_task(
                self._supervise(adopted), name="platforms.local.supervise"
            )

    async def nodes(self) -> tuple[Node, ...]:
        return self._bookings.nodes

    async def stocks(self) -> dict[str, Stock]:
        return self._bookings.stocks

    async def acquire(
        self, allocation: AllocationId, node: NodeId, resources: Resources, lease_class: LeaseClass
    ) -> Allocation:
        return self._bookings.book(allocation, node, resources)

    async def release(self, allocation: AllocationId) -> None:
        self._bookings.free(allocation)

    async def allocations(self) -> dict[AllocationId, AllocationState] | None:
        return self._bookings.states()

    def agent_of(self, allocation: AllocationId, node: NodeId) -> NodeId | None:
        return None

    async def fate(self, allocation: AllocationId, node: NodeId) -> Allocation | None:
        return self._bookings.held(allocation)

    def want(self, waiting: Sequence[Resources]) -> None:
        """There is no more than there is."""

    def pools(self) -> tuple[PoolReport, ...]:
        return ()

    async def close(self) -> None:
        """Stop the agent: SIGTERM, then SIGKILL for its whole group. Twice is fine."""
        self._bookings.clear()
        if self._supervising is None:
            return
        self._supervising.cancel()
        await asyncio.gather(self._supervising, return_exceptions=True)
        self._supervising = None
        (self._state / "agent.json").unlink(missing_ok=True)

    # the agent process --------------------------------------------------------------------------------------
    async def _supervise(self, adopted: AgentFile | None) -> None:
        if adopted is not None:
            await self._watch_adopted(adopted)
        backoff_s = BACKOFF_FIRST_S
        loop = asyncio.get_running_loop()
        while True:
            started_at = loop.time()
            code = await self._run_agent()
            if loop.time() - started_at >= STEADY_S:
                backoff_s = BACKOFF_FIRST_S
            _log.error("agent ended; starting another", code=code, pause_s=backoff_s, log=str(self._log_path))
            try:
                await asyncio.sleep(backoff_s)
            except asyncio.CancelledError:
                await self._clear_up()
                raise
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _run_agent(self) -> int:
        """One agent, from its start to its end; ended with its group when this is cancelled."""
        process = await self._start_agent()
        self._pid = process.pid
        self._remember(process.pid)
        try:
            return await process.wait()
        except asyncio.CancelledError:
            await self._stop(process.pid, process.wait())
            if process.returncode != 0:
                await self._clear_up()
            raise
        finally:
            self._pid = 0

    async def _start_agent(self) -> asyncio.subprocess.Process:
        """It takes SIGTERM from when it can end what an earlier agent left; one that comes sooner waits."""
        with self._open_log() as log, _deferred(signal.SIGTERM):
            return await asyncio.create_subprocess_exec(
                *self._command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )

    async def _clear_up(self) -> None:
        """End what an agent left that did not end in order: by another one that ends at once."""
        process = await self._start_agent()
        await self._stop(process.pid, process.wait())

    async def _watch_adopted(self, agent: AgentFile) -> None:
        """Until an agent that an earlier site started is gone."""
        self._pid = agent.pid
        _log.info("took over the running agent", pid=agent.pid)
        try:
            await _gone(agent)
        except asyncio.CancelledError:
            if not await self._stop(agent.pid, _gone(agent)):
                await self._clear_up()
            raise
        finally:
            self._pid = 0

    async def _stop(self, pid: int, gone: Coroutine[object, object, object]) -> bool:
        """Whether it ended by itself, as far as can be seen: then it left nothing behind."""
        was_there = True
        try:
            os.kill(pid, signal.SIGTERM)
        except ProcessLookupError:
            was_there = False
        waiting = asyncio.ensure_future(gone)
        done, _ = await asyncio.wait({waiting}, timeout=STOP_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # the agent leads its group, which may outlive it
        if not done:
            await waiting
        return was_there and bool(done)

    def _command(self) -> list[str]:
        node = self._bookings.nodes[0].node
        command = [*agent_words("", self._agent_url), "--node", node]
        command += ["--state", str(self._state), "--cache", str(self._cache.absolute())]
        command += ["--parent", str(self._parent)] if self._parent else []
        return command + (["--ephemeral"] if self._is_ephemeral else [])

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **secrets(self._join_key, self._bookings.nodes[0].node, self._settings)}

    @property
    def _log_path(self) -> Path:
        return self._state / "logs" / "agent.log"

    def _open_log(self) -> BinaryIO:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        if self._log_path.exists() and self._log_path.stat().st_size > LOG_BYTES_MAX:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        return self._log_path.open("ab")

    def _remember(self, pid: int) -> None:
        agent = AgentFile(pid=pid, started=_started(pid), url=self._agent_url)
        path = self._state / "agent.json"
        path.with_suffix(".new").write_bytes(msgspec.json.encode(agent))
        path.with_suffix(".new").replace(path)

    def _find_agent(self) -> AgentFile | None:
        """The agent of an earlier site that still runs and dials us; one that dials elsewhere is replaced."""
        agent = running_agent(self._state)
        if agent is None:
            return None
        if agent.url == self._agent_url:
            return agent
        _log.warning("replacing an agent that dials an earlier site", pid=agent.pid, url=agent.url)
        with contextlib.suppress(ProcessLookupError):
            os.kill(agent.pid, signal.SIGKILL)  # only the agent: its executors are adopted by the next one
        return None


def running_agent(state: Path) -> AgentFile | None:
    """The agent that a site, perhaps dead by now, started in this state directory and that still runs."""
    try:
        agent = msgspec.json.decode((state / "agent.json").read_bytes(), type=AgentFile)
    except (OSError, msgspec.MsgspecError):
        return None
    return agent if is_alive(agent.pid) and _started(agent.pid) == agent.started else None


@contextlib.contextmanager
def _deferred(number: signal.Signals) -> Iterator[None]:
    """Processes started meanwhile begin with this signal blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


async def _gone(agent: AgentFile) -> None:
    """Until this process is no more; it is not our child, so it cannot be waited for."""
    while is_alive(agent.pid) and _started(agent.pid) == agent.started:
        try:
            descriptor = os.pidfd_open(agent.pid)
        except ProcessLookupError:
            return
        except OSError:  # a kernel before 5.3
            await asyncio.sleep(POLL_S)
            continue
        try:
            await readable(descriptor)
            return
        finally:
            os.close(descriptor)


def _started(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0: none. Source: proc(5), stat, field 22."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
