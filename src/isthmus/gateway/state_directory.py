"""A site's state directory: readable by its user only, held by one site at a time, and the notes left in it.

lock         held (flock) by the running site, whose process id and machine it names
site.json    how local clients find it; only while it runs
key          its own administrator key          site.key   signs lease tokens
join.key     what agents prove they hold        *.sqlite3  ledger, keys, durable calls
logs/        site.log (JSON lines)              leases/    pages and logs of leases, the agent's
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import NamedTuple, Self

import msgspec

from isthmus.core.api import SiteFile
from isthmus.core.discovery import SITE_FILE
from isthmus.core.errors import SettingsError
from isthmus.core.ownership import is_ours


@contextlib.contextmanager
def hold(state: Path) -> Iterator[None]:
    """Make the directory ours until the block ends. Raises SettingsError when another site has it.

    The lock is the kernel's, so a killed site never leaves it behind.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_ours(state.resolve(), alone=False):  # root could use it, and its owner would read the keys
            raise SettingsError(f"{state} belongs to another user; name another state directory with --state")
        state.chmod(0o700)
        descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(
            f"cannot use {state} as state directory: {error.strerror}; name another with --state"
        ) from error
    with os.fdopen(descriptor, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"another site ({_Holder.of(lock.read()).words}) uses {state}; "
                f"stop it with `isthmus down --state {quote(str(state))}` or name another directory"
            ) from error
        lock.truncate()
        lock.write(f"{os.getpid()} {socket.gethostname()}")
        lock.flush()
        yield


def holder(state: Path) -> int:
    """Process id of the site that holds the directory, also while it starts or stops; 0: none does.

    Raises SettingsError when it runs on another machine, which shares the directory.
    """
    try:
        with open(state / "lock", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        with contextlib.suppress(OSError):
            found = _Holder.of((state / "lock").read_text("ascii"))
            if found.host not in ("", socket.gethostname()):
                raise SettingsError(f"the site of {state} runs on {found.host}: stop it there") from None
            return found.pid
    except OSError:
        return 0
    return 0


class _Holder(NamedTuple):
    """What the lock says. `pid` 0, `host` empty: it does not."""

    pid: int
    host: str

    @classmethod
    def of(cls, text: str) -> Self:
        pid, _, host = text.strip().partition(" ")
        return cls(int(pid) if pid.isdecimal() else 0, host)

    @property
    def words(self) -> str:
        return f"pid {self.pid or 'unknown'}" + (f" on {self.host}" if self.host else "")


def is_gone(state: Path) -> bool:
    """Whether somebody removed the directory that a running site holds."""
    return not (state / "lock").exists()


def announce(state: Path, site: SiteFile) -> None:
    temporary = state / f".{SITE_FILE}"
    temporary.write_bytes(msgspec.json.encode(site))
    temporary.replace(state / SITE_FILE)


def withdraw(state: Path) -> None:
    (state / SITE_FILE).unlink(missing_ok=True)


def last_port(state: Path) -> int:
    """The port of the site that died here without withdrawing, so that its agent finds the next one there;
    else 0.
    """
    try:
        site = msgspec.json.decode((state / SITE_FILE).read_bytes(), type=SiteFile)
        return int(site.url.rpartition(":")[2])
    except (OSError, ValueError, msgspec.MsgspecError):
        return 0
