"""What an agent writes down, so that its successor can go on: one directory per lease.

    STATE/leases/LEASE/lease.msgpack     LeaseRecord, written before anything is started
    STATE/leases/LEASE/EXECUTOR.page     one page per executor (`page.py`), kept until the lease ends
    STATE/leases/LEASE/log               output of all its executors
    STATE/ended/LEASE.msgpack            a LeaseEnded that the site may not have seen yet

Files are replaced atomically. They are not synced to the disk, except ends: a power cut that would lose the
record of a running lease takes its processes too.
"""

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


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All that must be known of a lease to adopt it. Times are CLOCK_MONOTONIC of this boot."""

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
        shutil.rmtree(self.directory(lease), ignore_errors=True)

    def write_end(self, end: LeaseEnded) -> None:
        _replace(self._ended / f"{end.lease}.msgpack", msgspec.msgpack.encode(end), sync=True)

    def ends(self) -> list[LeaseEnded]:
        found = []
        for path in sorted(self._ended.iterdir()):
            try:
                found.append(msgspec.msgpack.decode(path.read_bytes(), type=LeaseEnded))
            except (OSError, msgspec.MsgspecError):
                path.unlink(missing_ok=True)
        return found

    def forget_end(self, lease: LeaseId) -> None:
        (self._ended / f"{lease}.msgpack").unlink(missing_ok=True)


def _replace(path: Path, data: bytes, *, sync: bool) -> None:
    draft = path.with_suffix(".draft")
    with draft.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    draft.rename(path)
