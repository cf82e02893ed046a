"""What an agent writes down, so that its successor can go on: one directory per lease.

    STATE/leases/LEASE/lease.msgpack     LeaseRecord, written before anything is started
    STATE/leases/LEASE/EXECUTOR.page     one page per executor (`page.py`), kept until the lease ends
    STATE/leases/LEASE/log               output of all its executors
    STATE/ended/LEASE.msgpack            a LeaseEnded that the site may not have seen yet
    STATE/ended/LEASE.log                what a lease that is over had written, the newest of them

Files are replaced atomically. They are not synced to the disk, except ends: a power cut that would lose the
record of a running lease takes its processes too.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from isthmus.core.ids import LeaseId, TenantId
from isthmus.core.model import Enforcement, Environment, Resources
from isthmus.node.messages import LeaseEnded

RECORD_FILE = "lease.msgpack"
LOG_FILE = "log"
ENDED_LOGS_MAX = 256  # of leases that are over, kept on this node; the oldest go first
ENDED_LOGS_BYTES_MAX = 256 * 2**20  # of all of them together, on the disk
_LOG_SUFFIX = ".log"


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that must be known of a lease to adopt it. Times are CLOCK_MONOTONIC of this boot.

    ahead_s  how far the site's clock was ahead of this node's when the lease began
    """

    boot: str
    lease: LeaseId
    tenant: TenantId
    resources: Resources
    environment: Environment
    lease_key: bytes
    cores: tuple[int, ...]
    enforcement: Enforcement
    started_ns: int
    deadline_ns: int
    ahead_s: float = 0.0
    is_harvested: bool = False


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Records:
    """The state directory of one agent; a lock keeps a second agent out."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._leases = state / "leases"
        self._ended = state / "ended"
        for directory in (self._leases, self._ended):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def directory(self, lease: LeaseId) -> Path:
        return self._leases / lease

    def write(self, record: LeaseRecord) -> None:
        directory = self.directory(record.lease)
        directory.mkdir(exist_ok=True, mode=0o700)
        _replace(directory / RECORD_FILE, msgspec.msgpack.encode(record), sync=False)

    def leases(self) -> Iterator[tuple[LeaseId, LeaseRecord | None]]:
        """Every lease directory with its record; None where it cannot be read."""
        for directory in sorted(self._leases.iterdir()):
            try:
                data = (directory / RECORD_FILE).read_bytes()
                yield LeaseId(directory.name), msgspec.msgpack.decode(data, type=LeaseRecord)
            except (OSError, msgspec.MsgspecError):
                yield LeaseId(directory.name), None

    def forget(self, lease: LeaseId) -> None:
        """Remove all of the lease but what it wrote, which `trim_ended_logs` may remove later."""
        self._keep_log(lease)
        shutil.rmtree(self.directory(lease), ignore_errors=True)

    def write_end(self, end: LeaseEnded) -> None:
        _replace(self._ended / f"{end.lease}.msgpack", msgspec.msgpack.encode(end), sync=True)

    def ends(self) -> list[LeaseEnded]:
        found = []
        for path in sorted(self._ended.iterdir()):
            if path.suffix == _LOG_SUFFIX:
                continue
            try:
                found.append(msgspec.msgpack.decode(path.read_bytes(), type=LeaseEnded))
            except (OSError, msgspec.MsgspecError):
                path.unlink(missing_ok=True)
        return found

    def forget_end(self, lease: LeaseId) -> None:
        (self._ended / f"{lease}.msgpack").unlink(missing_ok=True)

    def ended_log(self, lease: LeaseId) -> Path:
        """Where the output of a lease that is over lies, if there is any."""
        return self._ended / f"{lease}{_LOG_SUFFIX}"

    def trim_ended_logs(self, logs_max: int = ENDED_LOGS_MAX, bytes_max: int = ENDED_LOGS_BYTES_MAX) -> None:
        """Remove the oldest logs beyond the limits."""
        kept_bytes = 0
        for number, (_, size_bytes, path) in enumerate(sorted(self._ended_logs(), reverse=True), start=1):
            kept_bytes += size_bytes
            if number > logs_max or kept_bytes > bytes_max:
                path.unlink(missing_ok=True)

    def _keep_log(self, lease: LeaseId) -> None:
        log = self.directory(lease) / LOG_FILE
        with contextlib.suppress(OSError):  # nothing was written, or it cannot be moved
            if log.stat().st_size:
                os.utime(log)  # their age counts from the end of the lease
                log.rename(self.ended_log(lease))

    def _ended_logs(self) -> Iterator[tuple[int, int, Path]]:
        """(end, bytes on the disk, path) of each."""
        for path in self._ended.glob(f"*{_LOG_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another end removed it just now
                status = path.stat()
                yield status.st_mtime_ns, status.st_blocks * 512, path


def _replace(path: Path, data: bytes, *, sync: bool) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    draft.rename(path)
