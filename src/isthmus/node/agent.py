"""The agent: one process per node that does what the site orders, and guards leases when the site is away.

    python -m isthmus.node.agent --site ws://HOST:PORT/agent --node NAME --state DIR
                                 [--name NAME] [--parent PID] [--ephemeral] [--cache DIR]
                                 [--lend-cores N|auto] [--lend-memory SIZE|auto]

With `--name` it is the guest of a batch job and serves that one allocation, whose name it has: SIGTERM then
means that the batch system takes everything back. With `--lend-cores` it runs inside somebody's batch job and
offers what that job leaves idle, as a node of its own, to harvested leases only.
Its key comes in ISTHMUS_AGENT_KEY (hex), settings in ISTHMUS_AGENT_SETTINGS (JSON NodeSettings); both are
removed from the environment at once. Killed, it leaves its executors running; started again with the same
state directory, it adopts them. SIGTERM and the parent's death end everything.
Not here: leases (`hosting.py`), the line to the site (`connection.py`).
"""

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import sys
import time
import zlib
from collections import deque
from pathlib import Path

import msgspec

from isthmus.core.errors import AuthError, IsthmusError, SettingsError, SiteUnavailableError
from isthmus.core.ids import NodeId
from isthmus.core.model import ISTHMUS_VERSION, EndReason, Enforcement, Environment, python_version
from isthmus.core.settings import NodeSettings, Settings
from isthmus.core.units import parse_bytes
from isthmus.node import connection, processes
from isthmus.node.connection import Connection, DismissedError
from isthmus.node.environments import Environments
from isthmus.node.fencing import CATCH_UP_S, STOPPED_S
from isthmus.node.harvesting import Harvesting
from isthmus.node.hosted import enforced
from isthmus.node.hosting import Host
from isthmus.node.isolation import cached, choose, shaped, state_tag
from isthmus.node.launching import rest_url
from isthmus.node.leases import Allotments, Capacity
from isthmus.node.lending import JOINED_FILE, LOCK_FILE, enter_state
from isthmus.node.messages import (
    AddExecutor,
    AgentHello,
    AnyMessage,
    Done,
    DrainLease,
    EndLease,
    Failed,
    Heartbeat,
    KillExecutor,
    LeaseEnded,
    Order,
    ReadLog,
    RenewLease,
    StartLease,
    Warm,
)
from isthmus.node.owners import Lent, lent_by
from isthmus.node.records import Records
from isthmus.node.shared_memory import SharedMemory
from isthmus.node.zygotes import Zygotes

EXPIRY_TICK_S = 0.25  # how late an expired lease, or output beyond its limit, may be noticed
REPORTS_MAX = 1000  # kept while the site is away; ends of leases are on disk besides
LOG_READ_MAX = 2**20
FAILURE_CHARACTERS_MAX = 10_000  # the words may be a build's, and the site takes no message of any length
OWNERS_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PROMPT_END_GRACE_S = 1.0
_SIGNAL_SEEN_S = 0.1  # a SIGTERM from before the start reaches its handler in the loop's next turns

log = logging.getLogger("isthmus.agent")


class Agent:
    def __init__(self, site: str, node: NodeId, state: Path, key: bytes, settings: NodeSettings,
                 cache: Path, guest: NodeId | None = None, lent: Lent | None = None) -> None:  # fmt: skip
        self._site = site
        self._name = guest or node
        self._key = key
        self._settings = settings
        self._state = state
        self._records = Records(state)
        isolation, why = choose(settings.isolation, state_tag(state))
        unshaped = unsized = ""
        if settings.bandwidth and lent is None:
            isolation, unshaped = shaped(isolation, settings.interface, state_tag(state))
        if settings.cache and lent is None:
            isolation, unsized = cached(isolation, Path(settings.cache_path), state)
        self._isolation = isolation
        self._why_no_stronger = "; ".join(filter(None, (why, unshaped, unsized)))
        self._lent = lent
        self._is_guest = bool(guest or lent)
        self._capacity = capacity(settings, guest) if lent is None else lent_capacity(lent)
        self._reports: deque[AnyMessage] = deque(maxlen=REPORTS_MAX)
        self._reported = asyncio.Event()
        self._connection: Connection | None = None
        self._stop = asyncio.Event()
        self._end_reason = EndReason.EVICTED if guest or lent else EndReason.SITE_STOPPED
        self._orders: set[asyncio.Task[None]] = set()
        self._shared = SharedMemory(state_tag(state))
        self._zygotes = Zygotes(
            settings.fabric, state / "agent.log", isolation, self._shared.variables, is_modest=bool(lent)
        )
        self._host = Host(
            settings, node, rest_url(site), Allotments(self._capacity), isolation, self._records,
            self._zygotes, Environments(cache), self._tell, is_guest=self._is_guest,
        )  # fmt: skip
        self._harvesting: Harvesting | None = None
        if lent is not None:
            self._harvesting = Harvesting(lent, self._host, settings.patience_s, self._beat_soon)

    async def run(self, parent: int | None) -> None:
        """Until SIGTERM, the parent's death, a site that stays away for longer than its orphan time, or one
        that dismisses the guest of an allocation which is over. What runs already and cannot be adopted runs
        on for a successor, unless this one was told to end everything.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._leave)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the site starts us with it blocked
        if parent is not None:
            _watch_parent(loop, parent, self._stop)
        tasks: list[asyncio.Task[None]] = []
        is_adopted = False
        try:
            await self._host.adopt()
            is_adopted = True
            self._keep(asyncio.create_task(self._warm(), name="agent.warm"))
            tasks += [
                asyncio.create_task(self._keep_connected(), name="agent.connection"),
                asyncio.create_task(self._expire(), name="agent.expiry"),
                asyncio.create_task(self._meter(), name="agent.meter"),
                asyncio.create_task(self._await_stop(), name="agent.stop"),
            ]
            if self._harvesting is not None:
                tasks.append(asyncio.create_task(self._harvesting.run(), name="agent.harvest"))
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # what went wrong in it is the agent's end, and is said
        finally:
            if not is_adopted:
                await asyncio.sleep(_SIGNAL_SEEN_S)
            if is_adopted or self._stop.is_set():
                await self._close(tasks)

    def _leave(self) -> None:
        self._host.leaving.set()
        self._stop.set()

    # the site -----------------------------------------------------------------------------------------------
    async def _keep_connected(self) -> None:
        lost_s = time.monotonic()
        attempt = 0
        while True:
            try:
                self._connection = await connection.dial(self._site, self._key, self._introduce)
                attempt = 0
                log.info("connected to %s", self._site)
                if self._lent is not None:
                    with contextlib.suppress(OSError):  # whoever waits for it gives up then
                        (self._state / JOINED_FILE).touch()
                await self._converse(self._connection)
            except DismissedError as error:
                log.info("%s", error)
                if self._is_guest:
                    return
            except AuthError as error:
                log.error("%s", error)
            except SiteUnavailableError as error:
                log.info("%s", error)
            if self._connection is not None:
                lost_s, self._connection = time.monotonic(), None
            if time.monotonic() - lost_s > max(self._host.orphan_s, self._settings.meter_s * 30):
                log.error("the site has been away for %.0f s: ending", time.monotonic() - lost_s)
                return
            await connection.backoff(attempt)
            attempt += 1

    async def _converse(self, line: Connection) -> None:
        self._host.set_orphan_s(line.orphan_s)
        for ended in self._records.ends():
            self._tell(ended)
        sender = asyncio.create_task(self._send_reports(line), name="agent.reports")
        try:
            await line.orders(lambda order: self._obey_soon(line, order))
        finally:
            sender.cancel()
            await line.close()

    async def _send_reports(self, line: Connection) -> None:
        """Send what was told, in order; an end of a lease is forgotten only when it has arrived."""
        try:
            while True:
                self._reported.clear()
                while self._reports:
                    message = self._reports[0]
                    await line.send(message)
                    if isinstance(message, LeaseEnded):
                        await line.flushed()
                        self._records.forget_end(message.lease)
                    self._reports.popleft()
                await self._reported.wait()
        except SiteUnavailableError as error:
            log.info("%s", error)

    def _introduce(self, nonce: bytes, proof: bytes) -> AgentHello:
        return AgentHello(
            node=self._name, nonce=nonce, proof=proof, version=ISTHMUS_VERSION, python=python_version(),
            hostname=socket.gethostname(), pid=os.getpid(), cores=self._capacity.count,
            memory_bytes=self._capacity.memory_bytes, gpus=self._capacity.gpus,
            enforcement=self._enforcement(), running=self._host.running(), lent=self._lent,
            now_s=time.time(),
        )  # fmt: skip

    def _enforcement(self) -> Enforcement:
        enforcement = self._isolation.enforcement
        detail = "; ".join(part for part in (enforcement.detail, self._why_no_stronger) if part)
        amounts = enforced(self._isolation, self._capacity.amounts)
        return msgspec.structs.replace(enforcement, detail=detail, amounts=amounts)

    # orders -------------------------------------------------------------------------------------------------
    def _obey_soon(self, line: Connection, order: Order) -> None:
        task = asyncio.create_task(self._answer(line, order), name=f"order-{order.number}")
        self._keep(task)

    async def _answer(self, line: Connection, order: Order) -> None:
        answer: Done | Failed
        try:
            answer = await self._obey(order)
        except IsthmusError as error:
            words = str(error)[:FAILURE_CHARACTERS_MAX]
            answer = Failed(number=order.number, code=type(error).__name__, message=words)
        except Exception as error:  # a task boundary: the site must hear of whatever went wrong here
            log.exception("order %d failed", order.number)
            words = f"the agent could not do it: {type(error).__name__}: {error}"[:FAILURE_CHARACTERS_MAX]
            answer = Failed(number=order.number, code="IsthmusError", message=words)
        try:
            await line.send(answer)
        except SiteUnavailableError as error:
            log.info("answer %d is lost: %s", order.number, error)

    async def _obey(self, order: Order) -> Done:
        host, number = self._host, order.number
        match order:
            case StartLease():
                executor, enforcement = await host.start(order)
                return Done(number=number, executor=executor, enforcement=enforcement)
            case AddExecutor(lease=lease):
                return Done(number=number, executor=await host.add_executor(lease))
            case RenewLease(lease=lease, now_s=now_s, deadline_s=deadline_s):
                host.renew(lease, deadline_s - now_s)
            case DrainLease(lease=lease):
                host.drain(lease)
            case EndLease(lease=lease, reason=reason, grace_s=grace_s):
                await host.end(lease, reason, grace_s)
            case KillExecutor(lease=lease, executor=executor_id):
                return Done(number=number, killed=await host.kill(lease, executor_id))
            case ReadLog(lease=lease, offset=offset, limit_bytes=limit_bytes):
                chunk = host.read_log(lease, offset, min(limit_bytes, LOG_READ_MAX))
                return Done(number=number, text=chunk.text, next_offset=chunk.next_offset)
            case Warm(environment=environment, spares=spares):
                await host.warm(environment, spares)
        return Done(number=number)

    # loops --------------------------------------------------------------------------------------------------
    def _tell(self, message: AnyMessage) -> None:
        self._reports.append(message)
        self._reported.set()

    async def _meter(self) -> None:
        while True:
            await asyncio.sleep(self._settings.meter_s)
            await self._host.cool()
            await self._beat()

    def _beat_soon(self) -> None:
        self._keep(asyncio.create_task(self._beat(), name="agent.heartbeat"))

    async def _beat(self) -> None:
        slack = self._harvesting.slack if self._harvesting is not None else None
        if self._connection is not None:
            with contextlib.suppress(SiteUnavailableError):  # its own task notices and dials again
                await self._connection.send(Heartbeat(leases=self._host.reports(), slack=slack))

    async def _expire(self) -> None:
        """End leases whose time is up; but after a suspension of this job, what the site says comes first."""
        catching_up_until = 0.0
        while True:
            began_at = time.monotonic()
            await asyncio.sleep(EXPIRY_TICK_S)
            self._host.trim_logs()
            now = time.monotonic()
            if now - began_at > EXPIRY_TICK_S + STOPPED_S:
                catching_up_until = now + CATCH_UP_S
            if now < catching_up_until:
                continue
            for lease in self._host.overdue(self._connection is not None):
                task = asyncio.create_task(
                    self._host.end(lease, EndReason.EXPIRED, 0.0, "nobody renewed it"), name=f"expire-{lease}"
                )
                self._keep(task)

    async def _warm(self) -> None:
        """Have the default environment ready before the first lease asks for it."""
        try:
            await self._host.warm(Environment(), 1)
        except IsthmusError as error:
            log.warning("the default environment is not warm: %s", error)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    async def _await_stop(self) -> None:
        await self._stop.wait()

    async def _close(self, tasks: list[asyncio.Task[None]]) -> None:
        """End every lease, tell the site if it is there, and leave no process behind."""
        line = self._connection
        for order in list(self._orders):
            order.cancel()
        await asyncio.gather(*self._orders, return_exceptions=True)
        await self._host.close(self._end_reason, _PROMPT_END_GRACE_S)
        await self._zygotes.close()
        await self._host.clear_remains()
        self._shared.remove()
        if line is not None:
            await self._send_last(line)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_last(self, line: Connection) -> None:
        try:
            async with asyncio.timeout(1.0):
                while self._reports:
                    await asyncio.sleep(0.01)
                await line.close()
        except TimeoutError:
            return


def capacity(settings: NodeSettings, guest: NodeId | None = None) -> Capacity:
    """What this process may use of the machine, or what the settings say of it. Raises SettingsError.

    A guest whose batch system binds no cores starts at a place of its own, so that guests spread out.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    if guest is not None and settings.cores < len(cores):
        first = zlib.crc32(guest.encode()) % len(cores)
        cores = cores[first:] + cores[:first]
    if settings.cores > len(cores):
        raise SettingsError(f"node.cores = {settings.cores}, but this process may use {len(cores)}")
    memory_bytes = (
        parse_bytes(settings.memory) if settings.memory else int(processes.memory_total_bytes() * 0.8)
    )
    return Capacity(
        cores=cores[: settings.cores or None], memory_bytes=memory_bytes, amounts=settings.amounts
    )


def lent_capacity(lent: Lent) -> Capacity:
    """All cores that the job may run on: the kernel finds the idle ones among them."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    return Capacity(cores=cores, memory_bytes=lent.memory_bytes, lent_cores=lent.cores)


def _watch_parent(loop: asyncio.AbstractEventLoop, pid: int, stop: asyncio.Event) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return stop.set()
    loop.add_reader(descriptor, stop.set)
    return None


def _lock_state(state: Path) -> int:
    """One agent per state directory; the lock goes with the process."""
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(state / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SettingsError(f"another agent works in {state}; stop it or name another --state") from error
    return descriptor


def main() -> int:
    parser = argparse.ArgumentParser(prog="isthmus.node.agent", description="Run leases on this node.")
    parser.add_argument("--site", required=True, help="ws://HOST:PORT/agent")
    parser.add_argument("--node", required=True)
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--name", help="serve this one allocation of a batch system")
    parser.add_argument("--parent", type=int, help="end everything when this process ends")
    parser.add_argument("--lend-cores", help="a number, or auto: of the job around it")
    parser.add_argument("--lend-memory", default="auto", help="a size, or auto")
    parser.add_argument("--ephemeral", action="store_true", help="remove the state if the site is gone")
    parser.add_argument("--cache", type=Path, help="where virtual environments are built")
    options = parser.parse_args()
    key = bytes.fromhex(os.environ.pop("ISTHMUS_AGENT_KEY", ""))
    if options.lend_cores:
        for number in OWNERS_SIGNALS:  # `scancel --signal` and `#SBATCH --signal` mean the job, not its guest
            signal.signal(number, signal.SIG_IGN)
    settings_json = os.environ.pop("ISTHMUS_AGENT_SETTINGS", "{}")
    try:
        settings = msgspec.json.decode(settings_json, type=NodeSettings)
        if options.lend_cores:
            enter_state(options.state)
        _lock_state(options.state)
        logging.basicConfig(
            filename=options.state / "agent.log",
            level=logging.INFO,
            format="%(asctime)s %(levelname)s %(message)s",
        )
        logging.getLogger("websockets").setLevel(logging.WARNING)
        return asyncio.run(_run(options, key, settings))
    except (SettingsError, ValueError, msgspec.MsgspecError) as error:
        print(f"isthmus agent: {error}", file=sys.stderr)
        return 2


async def _run(options: argparse.Namespace, key: bytes, settings: NodeSettings) -> int:
    cache = options.cache or Settings().cache_path
    guest = NodeId(options.name) if options.name else None
    state = options.state.resolve()
    lent = lent_by(os.environ, options.lend_cores, options.lend_memory) if options.lend_cores else None
    agent = Agent(options.site, NodeId(options.node), state, key, settings, cache, guest, lent)
    site = os.getppid()
    await agent.run(options.parent)
    if lent is not None or (options.ephemeral and os.getppid() != site):
        shutil.rmtree(state, ignore_errors=True)  # nobody comes back to it; or the site would have done it
    return 0


if __name__ == "__main__":
    sys.exit(main())
