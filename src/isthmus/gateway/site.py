"""The site: the one process that knows all parts, builds them, joins them, and takes them down in order.

    state directory -> keys, ledger -> agent hub -> leasing on a platform -> services -> REST
Started by `isthmus up`, or by `isthmus.connect()` as an embedded site that ends with its parent. Everything
that runs is a named task of one group; a task that fails takes the site down, so that its supervisor can
start a clean one.
"""

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import structlog
import uvicorn

from isthmus.core.api import SiteFile
from isthmus.core.clock import Clock, SystemClock
from isthmus.core.discovery import KEY_FILE, is_alive
from isthmus.core.errors import SettingsError
from isthmus.core.model import ISTHMUS_VERSION, Record
from isthmus.core.settings import GatewaySettings, PolicySettings, Settings
from isthmus.gateway import state_directory
from isthmus.gateway.agents import AgentHub
from isthmus.gateway.calls import Calls
from isthmus.gateway.guard import SiteGuard
from isthmus.gateway.keys import KeyStore, keep_secret, own_key
from isthmus.gateway.leases import Leases
from isthmus.gateway.nodes import Nodes
from isthmus.gateway.overview import Overview
from isthmus.gateway.policies import Policies
from isthmus.gateway.rest import application
from isthmus.gateway.tenants import Tenants
from isthmus.leasing import Leasing, Ledger
from isthmus.node.messages import MESSAGE_BYTES_MAX
from isthmus.platforms import LocalPlatform
from isthmus.policy import ALLOW_ALL, PolicySet, load_policies
from isthmus.services.functions import Functions
from isthmus.services.jobs import CallStore, Jobs, Relay
from isthmus.telemetry import logs

FIRST_AGENT_TIMEOUT_S = 20.0  # the site is ready even if its agent is not: requests wait for nodes
HTTP_SHUTDOWN_S = 1  # for answers on their way; waiting requests are cancelled
PARENT_POLL_S = 1.0  # only where the kernel has no pidfd

_log = structlog.get_logger("gateway.site")


class SiteOptions(Record, frozen=True):
    """state      the state directory
    ephemeral  remove it at the end; it must be empty at the start
    parent     process id: stop when that process is gone; 0: none
    ready_fd   write one line, the SiteFile as JSON, to this descriptor when ready; -1: do not
    """

    state: Path
    ephemeral: bool = False
    parent: int = 0
    ready_fd: int = -1


def run(settings: Settings, options: SiteOptions) -> None:
    """Serve until SIGTERM, SIGINT or the parent's end. Raises SettingsError when it cannot start."""
    with _state(options):
        logs.configure(options.state / "logs" / "site.log")
        asyncio.run(_serve(settings, options, SystemClock()))


@contextmanager
def _state(options: SiteOptions) -> Iterator[None]:
    if options.ephemeral and options.state.exists() and any(options.state.iterdir()):
        raise SettingsError(
            f"{options.state} is not empty; an ephemeral site removes its state directory at the end"
        )
    try:
        with state_directory.hold(options.state):
            yield
    finally:
        if options.ephemeral:
            shutil.rmtree(options.state, ignore_errors=True)


async def _serve(settings: Settings, options: SiteOptions, clock: Clock) -> None:
    listener = _listen(settings.gateway, state_directory.last_port(options.state))
    site = SiteFile(
        url=_url(settings.gateway, listener),
        pid=os.getpid(),
        version=ISTHMUS_VERSION,
        ephemeral=options.ephemeral,
    )
    stop = _stop_event(options.parent)
    async with _site(settings, options.state, clock, site, listener):
        state_directory.announce(options.state, site)
        _tell_ready(options.ready_fd, site)
        _log.info("site ready", url=site.url, version=site.version, ephemeral=site.ephemeral)
        await stop.wait()
        _log.info("site stopping")
        state_directory.withdraw(options.state)
    _log.info("site stopped")


@asynccontextmanager
async def _site(
    settings: Settings, state: Path, clock: Clock, site: SiteFile, listener: socket.socket
) -> AsyncIterator[None]:
    """All parts, running; taken down in the reverse order at the end of the block."""
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        keys = KeyStore(state / "keys.sqlite3", clock)
        stack.callback(keys.close)
        own_key(keys, state / KEY_FILE)
        site_key, join_key = keep_secret(state / "site.key"), keep_secret(state / "join.key")
        policies = _policies(settings.policy)
        hub = AgentHub(join_key, settings.leasing.orphan_s)
        platform = LocalPlatform(
            settings, state, site.url, join_key, parent=site.pid if site.ephemeral else 0
        )
        ledger = Ledger(state / "ledger.sqlite3")
        stack.callback(ledger.close)
        leasing = Leasing(settings.leasing, ledger, platform, hub, policies, clock, site_key)
        calls = CallStore(state / "calls.sqlite3", settings.leasing.history_s)
        stack.callback(calls.close)
        jobs = Jobs(settings.jobs, leasing, calls, Relay(settings.node.fabric), clock, keys.quota)
        operations = [
            *Overview(leasing, platform.name, site, clock).operations(),
            *Leases(leasing, hub).operations(),
            *Nodes(leasing, Functions(leasing)).operations(),
            *Policies(leasing).operations(),
            *Calls(jobs).operations(),
            *Tenants(keys).operations(),
        ]
        guard = SiteGuard(keys, leasing, site_key, clock)
        app = application(operations, guard, hub, leasing, settings.gateway.body_bytes_max)
        server = _server(app)
        http = tasks.create_task(server.serve(sockets=[listener]), name="gateway.http")
        loops = [
            tasks.create_task(leasing.run(), name="leasing.run"),
            tasks.create_task(jobs.run(), name="services.jobs"),
        ]
        try:
            await platform.start()
            await _first_agent(hub)
            yield
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.wait(loops)
            await jobs.close()
            await leasing.close()
            await platform.close()
            await hub.close()
            server.should_exit = True
            await asyncio.wait({http})


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the site decides what a signal means."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: object) -> _Server:
    return _Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            lifespan="off",
            ws="websockets-sansio",
            ws_max_size=MESSAGE_BYTES_MAX,
            ws_per_message_deflate=False,
            timeout_graceful_shutdown=HTTP_SHUTDOWN_S,
            timeout_keep_alive=60,
        )
    )


def _listen(settings: GatewaySettings, preferred_port: int) -> socket.socket:
    """Bind at once, so that the address is known before anything is told it. Raises SettingsError."""
    for port in [settings.port] if settings.port else [preferred_port, 0]:
        try:
            listener = socket.create_server((settings.host, port), backlog=1024)
            break
        except OSError as error:
            failure = error
    else:
        where = f"{settings.host}:{settings.port}"
        raise SettingsError(f"cannot listen at {where}: {failure.strerror}; change gateway.port")
    # Connections inherit it. Without it each answer of two writes waits 40 ms for the peer's delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _policies(settings: PolicySettings) -> PolicySet:
    """Raises SettingsError or PolicyError, naming the file."""
    if not settings.file:
        return ALLOW_ALL
    try:
        return load_policies(Path(settings.file).read_text("utf-8"), settings.file)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"policy.file: {error}") from error


def _url(settings: GatewaySettings, listener: socket.socket) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "") else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


async def _first_agent(hub: AgentHub) -> None:
    try:
        async with asyncio.timeout(FIRST_AGENT_TIMEOUT_S):
            await hub.any_joined()
    except TimeoutError:
        _log.error("no agent joined yet; leases wait for it", timeout_s=FIRST_AGENT_TIMEOUT_S)


def _tell_ready(descriptor: int, site: SiteFile) -> None:
    if descriptor < 0:
        return
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(msgspec.json.encode(site) + b"\n")


def _stop_event(parent: int) -> asyncio.Event:
    """Set by SIGTERM, SIGINT, SIGHUP or the end of the parent."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    if parent:
        _watch(parent, stop)
    return stop


def _watch(parent: int, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    try:
        loop.add_reader(os.pidfd_open(parent), stop.set)
    except ProcessLookupError:
        stop.set()
    except OSError:  # a kernel before 5.3
        if is_alive(parent):
            loop.call_later(PARENT_POLL_S, _watch, parent, stop)
        else:
            stop.set()
