"""The site: the one process that knows all parts, builds them, joins them, and takes them down in order.

    state directory -> keys, ledger -> agent hub -> leasing on a platform -> services -> REST
Started by `isthmus up`, or by `isthmus.connect()` as an embedded site that ends with its parent. Everything
that runs is a named task of one group; a task that fails takes the site down, so that its supervisor can
start a clean one.
"""

import asyncio
import errno
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple

import structlog
from starlette.applications import Starlette

from isthmus.core.api import SiteFile
from isthmus.core.clock import Clock, SystemClock
from isthmus.core.discovery import KEY_FILE, is_alive
from isthmus.core.errors import SettingsError
from isthmus.core.model import ISTHMUS_VERSION, Record
from isthmus.core.settings import PolicySettings, Settings
from isthmus.gateway import http, state_directory
from isthmus.gateway.agents import AgentHub
from isthmus.gateway.calls import Calls
from isthmus.gateway.guard import SiteGuard
from isthmus.gateway.keys import KeyStore, keep_secret, own_key
from isthmus.gateway.leases import Leases
from isthmus.gateway.nodes import Nodes
from isthmus.gateway.overview import Overview
from isthmus.gateway.policies import Policies
from isthmus.gateway.rest import application
from isthmus.gateway.signals import Signals
from isthmus.gateway.tenants import Tenants
from isthmus.leasing import Leasing, Ledger
from isthmus.platforms import LocalPlatform, Platform, SlurmPlatform, capacity
from isthmus.platforms.slurm import open_client
from isthmus.policy import ALLOW_ALL, PolicySet, load_policies
from isthmus.services.functions import Functions
from isthmus.services.jobs import CallStore, Jobs, Relay
from isthmus.telemetry import logs

FIRST_AGENT_TIMEOUT_S = 20.0  # the site is ready even if its agent is not: requests wait for nodes
STATE_POLL_S = 2.0
PARENT_POLL_S = 1.0  # only where the kernel has no pidfd

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)

_log = structlog.get_logger("gateway.site")


class SiteOptions(Record, frozen=True):
    """state      the state directory
    ephemeral  remove it at the end; it must be empty at the start
    parent     process id: stop when that process is gone; 0: none
    """

    state: Path
    ephemeral: bool = False
    parent: int = 0


def run(settings: Settings, options: SiteOptions, on_ready: Callable[[SiteFile], None]) -> None:
    """Serve until SIGTERM, SIGINT or the parent's end. Raises SettingsError when it cannot start."""
    try:
        with _state(options):
            logs.configure(options.state / "logs" / "site.log")
            asyncio.run(_serve(settings, options, on_ready, SystemClock()))
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise SettingsError(
            f"cannot write in {options.state}: {error.strerror}; name another directory with --state"
        ) from error


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


async def _serve(
    settings: Settings, options: SiteOptions, on_ready: Callable[[SiteFile], None], clock: Clock
) -> None:
    listener = http.listen(settings.gateway, state_directory.last_port(options.state))
    site = SiteFile(
        url=http.url_of(settings.gateway, listener),
        pid=os.getpid(),
        version=ISTHMUS_VERSION,
        ephemeral=options.ephemeral,
    )
    stop = _stop_event(options.parent)
    _watch_state(options.state, stop)
    with listener, ExitStack() as stack:
        parts = _build(settings, options, clock, site, stack)
        async with _running(parts, listener, stop):
            state_directory.announce(options.state, site)
            on_ready(site)
            _log.info("site ready", url=site.url, version=site.version, ephemeral=site.ephemeral)
            await stop.wait()
            _log.info("site stopping")
            state_directory.withdraw(options.state)
    _log.info("site stopped")


class _Parts(NamedTuple):
    """What runs, and has to be stopped in order."""

    hub: AgentHub
    platform: Platform
    leasing: Leasing
    jobs: Jobs
    signals: Signals
    application: Starlette


def _build(
    settings: Settings, options: SiteOptions, clock: Clock, site: SiteFile, stack: ExitStack
) -> _Parts:
    """Make and join all parts; nothing runs yet. What is opened here is closed by `stack`.

    Raises SettingsError, PolicyError, LedgerError.
    """
    state = options.state
    policies = _policies(settings.policy)
    keys = KeyStore(state / "keys.sqlite3", clock)
    stack.callback(keys.close)
    ledger = Ledger(state / "ledger.sqlite3")
    stack.callback(ledger.close)
    calls = CallStore(state / "calls.sqlite3", settings.leasing.history_s, settings.jobs.tenant_bytes_max)
    stack.callback(calls.close)
    own_key(keys, state / KEY_FILE)
    site_key, join_key = keep_secret(state / "site.key"), keep_secret(state / "join.key")
    hub = AgentHub(join_key, settings.leasing.orphan_s, clock)
    platform = _platform(settings, options, site.url, join_key, hub)
    leasing = Leasing(settings.leasing, ledger, platform, hub, policies, clock, site_key)
    jobs = Jobs(settings.jobs, leasing, calls, Relay(settings.gateway.body_bytes_max), clock, keys.quota)
    operations = [
        *Overview(leasing, platform, site, clock).operations(),
        *Leases(leasing, hub).operations(),
        *Nodes(leasing, Functions(leasing)).operations(),
        *Policies(leasing, keys.quota, keys.tenants).operations(),
        *Calls(jobs).operations(),
        *Tenants(keys).operations(),
    ]
    guard = SiteGuard(keys, leasing, site_key, clock)
    app = application(operations, guard, hub, leasing, settings.gateway.body_bytes_max)
    signals = Signals(settings.policy, leasing.hear, clock)
    return _Parts(hub, platform, leasing, jobs, signals, app)


@asynccontextmanager
async def _running(parts: _Parts, listener: socket.socket, stop: asyncio.Event) -> AsyncIterator[None]:
    """All parts at work; stopped at the end of the block: first those that use others, REST last."""
    server = http.Server(parts.application)
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[listener]), name="gateway.http")
        loops = [
            tasks.create_task(parts.leasing.run(), name="leasing.run"),
            tasks.create_task(parts.jobs.run(), name="services.jobs"),
            tasks.create_task(parts.signals.run(), name="gateway.signals"),
        ]
        try:
            await parts.platform.start()
            if isinstance(parts.platform, LocalPlatform):
                await _first_agent(parts.hub, stop)
            else:
                await parts.leasing.surveyed()
            yield
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.wait(loops)
            await parts.jobs.close()
            await parts.leasing.close()
            await parts.platform.close()
            await parts.hub.close()
            server.stop()
            await asyncio.wait({serving})


def _platform(
    settings: Settings, options: SiteOptions, site_url: str, join_key: bytes, hub: AgentHub
) -> Platform:
    if settings.platform == "slurm":
        client = open_client(settings.slurm, site_url)
        return SlurmPlatform(settings, options.state, site_url, join_key, hub.joined, hub.dismiss, client)
    capacity.check(settings.node)
    # An embedded site's agent ends with the client, not with the site: open leases survive the site's death.
    return LocalPlatform(settings, options.state, site_url, join_key, options.parent, options.ephemeral)


def _policies(settings: PolicySettings) -> PolicySet:
    """Raises SettingsError or PolicyError, naming the file."""
    if not settings.file:
        return ALLOW_ALL
    try:
        return load_policies(Path(settings.file).read_text("utf-8"), settings.file)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"policy.file: {error}") from error


async def _first_agent(hub: AgentHub, stop: asyncio.Event) -> None:
    """Until the first agent is here, the site is told to stop, or the time is over."""
    waiting = [asyncio.ensure_future(hub.any_joined()), asyncio.ensure_future(stop.wait())]
    await asyncio.wait(waiting, timeout=FIRST_AGENT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    if not any(one.done() for one in waiting):
        _log.error("no agent joined yet; leases wait for it", timeout_s=FIRST_AGENT_TIMEOUT_S)
    for one in waiting:
        one.cancel()


def _stop_event(parent: int) -> asyncio.Event:
    """Set by SIGTERM, SIGINT, SIGHUP or the end of the parent."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    if parent:
        _watch(parent, stop)
    return stop


def _watch_state(state: Path, stop: asyncio.Event) -> None:
    """Without its directory nobody can find the site any more, nor `isthmus down` stop it."""
    if state_directory.is_gone(state):
        _log.error("the state directory was removed: stopping", state=str(state))
        stop.set()
    else:
        asyncio.get_running_loop().call_later(STATE_POLL_S, _watch_state, state, stop)


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
