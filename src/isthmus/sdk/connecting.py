"""Find a site, or start one: the way from `isthmus.connect()` to an open Site.

In this order: the lease that this code runs under, the site named in the call, the configured one, the one
that runs for this user on this machine, else an embedded one that ends with this process.
Not here: what a found site is used for (`site.py`).
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from isthmus.core import discovery, settings
from isthmus.core.api import SiteFile
from isthmus.core.discovery import Endpoint
from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import LeaseId
from isthmus.core.settings import Settings
from isthmus.sdk.control import Control
from isthmus.sdk.site import Site
from isthmus.sdk.supply import LeaseSupply, NestedSupply, Supply

START_TIMEOUT_S = 60.0  # an embedded site that is not ready by then never will be
AGENT_POLL_S = 0.02  # it is not our child, so its end is looked for
STOP_TIMEOUT_S = 10.0  # it ends its leases within this, or is killed
LOG_TAIL_BYTES = 4000


def connect(site: str = "", *, api_key: str = "", settings: Settings | None = None) -> Site:
    """An open Site: `with isthmus.connect() as site: ...`

    site      URL of a site; "" finds or starts one
    raises    SiteUnavailableError when the embedded site cannot be started, SettingsError
    """
    known = settings or _load()
    if site:
        key = api_key or _key_for(site, known)
        return _open(Endpoint(site.rstrip("/"), key), known)
    found = discovery.discover(known)
    if found is not None:
        return _open(found, known)
    embedded = _Embedded.shared()
    return _open(embedded.endpoint, known, embedded)


_current: Site | None = None
_current_lock = threading.Lock()


def current_site() -> Site:
    """The site that this code runs under, from inside a call: one per executor, opened with the first use."""
    global _current
    with _current_lock:
        if _current is None or not _current.usable:
            _current = connect()
        return _current


def _load() -> Settings:
    return settings.load()


def _key_for(url: str, known: Settings) -> str:
    client = msgspec.structs.replace(known.client, site=url)
    found = discovery.discover(msgspec.structs.replace(known, client=client), {"HOME": str(Path.home())})
    return found.key if found is not None else ""


def _open(endpoint: Endpoint, known: Settings, embedded: "_Embedded | None" = None) -> Site:
    control = Control(endpoint.url, endpoint.key)
    supply: Supply = LeaseSupply(control)
    if endpoint.key.startswith("lease:"):
        supply = NestedSupply(control, LeaseId(endpoint.key.split(":")[1]))
    return Site(control, supply, known.client, embedded.release if embedded is not None else None)


class _Ready(NamedTuple):
    process: subprocess.Popen[bytes]
    endpoint: Endpoint


class _Embedded:
    """The one embedded site of this process: started by the first `connect`, stopped when the last Site
    closes.
    """

    _instance: "_Embedded | None" = None
    _instance_lock = threading.Lock()

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="isthmus-", ignore_cleanup_errors=True)
        self._users = 0
        self._pid = os.getpid()
        self._process, self.endpoint = _start(Path(self._home.name))

    @classmethod
    def shared(cls) -> "_Embedded":
        with cls._instance_lock:
            site = cls._instance
            if site is None or site._pid != os.getpid() or site._process.poll() is not None:
                site = cls._instance = cls()
                atexit.register(site._stop)
            site._users += 1
            return site

    def release(self) -> None:
        with self._instance_lock:
            self._users -= 1
            if self._users > 0:
                return
            if type(self)._instance is self:
                type(self)._instance = None
        self._stop()

    def _stop(self) -> None:
        if self._pid != os.getpid():
            return
        atexit.unregister(self._stop)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.returncode != 0:
            _end_agent(Path(self._home.name))
        self._home.cleanup()


def _end_agent(state: Path) -> None:
    """A site that was killed could not stop its agent, which keeps the open leases going."""
    try:
        pid = int(json.loads((state / "agent.json").read_bytes())["pid"])
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError, KeyError):
        return
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    while discovery.is_alive(pid) and time.monotonic() < deadline_s:
        time.sleep(AGENT_POLL_S)


def _start(state: Path) -> _Ready:
    """Start `isthmus up --ephemeral` and wait for the line it writes when it is ready."""
    receiver, sender = os.pipe()
    with os.fdopen(receiver, "rb", buffering=0) as ready, tempfile.TemporaryFile() as log_file:
        command = [sys.executable, "-m", "isthmus", "up", "--ephemeral", "--parent", str(os.getpid()),
                   "--state", str(state), "--ready-fd", str(sender)]  # fmt: skip
        try:
            process = subprocess.Popen(
                command, pass_fds=(sender,), stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file,
                start_new_session=True,  # Ctrl-C is for the client, which then ends the site in order
            )  # fmt: skip
        finally:
            os.close(sender)
        line = _read_line(ready.fileno(), time.monotonic() + START_TIMEOUT_S)
        if not line:
            process.kill()
            process.wait()
            log_file.seek(0)
            tail = log_file.read()[-LOG_TAIL_BYTES:].decode("utf-8", "replace").strip()
            raise SiteUnavailableError(
                f"the embedded site did not start; its last words:\n{tail or '(none)'}"
            )
    url = msgspec.convert(json.loads(line), SiteFile).url
    return _Ready(process, Endpoint(url, (state / discovery.KEY_FILE).read_text("ascii").strip()))


def _read_line(descriptor: int, deadline_s: float) -> bytes:
    """What arrives before a newline, or b"" at end of file or deadline."""
    line = b""
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([descriptor], [], [], max(deadline_s - time.monotonic(), 0.0))
        chunk = os.read(descriptor, 4096) if readable else b""
        if not chunk:
            return b""
        line += chunk
    return line
