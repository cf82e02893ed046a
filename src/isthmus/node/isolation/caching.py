"""Cache: a directory on the node's own disk for each lease, no larger than it asked for.

    PATH/isthmus-TAG-LEASE/
        owner   link to the state directory of the agent that made it
        image   a file system of that size in a sparse file, where such may be mounted
        data    what functions are given: the file system, or else a plain directory of any size

Invariant: it goes with its lease. What an agent left whose state directory is no more (that of a job that was
killed) goes when the next agent starts here.
Invariant: where all users may write, anybody may have made a directory of such a name; those are left alone.
Source: mke2fs(8), mount(8), umount2(2), the loop device.
"""

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from isthmus.core.errors import SettingsError
from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.core.ownership import is_ours
from isthmus.node.isolation.isolation import GROUP_PREFIX, Isolation, Share
from isthmus.node.isolation.layers import Layer, run

KIND = "cache"
COMMAND_S = 60.0  # a slow disk writes the tables of a large file system
_DETACH, _NOFOLLOW = 2, 8  # linux/fs.h: MNT_DETACH, UMOUNT_NOFOLLOW
_PROBE_BYTES = 16 * 2**20
_MAKE = ("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-T", "largefile",
         "-E", "lazy_itable_init=1,nodiscard")  # fmt: skip


class Cached(Layer):
    """An isolation that also gives leases their cache.

    path    the directory on the node's disk; state: the agent's state directory
    """

    def __init__(self, inner: Isolation, path: Path, state: Path, tag: str) -> None:
        super().__init__(inner)
        self._path = path
        self._state = state.resolve()
        self._prefix = f"{GROUP_PREFIX}{tag}-"
        self.is_limited = False

    @property
    def enforcement(self) -> Enforcement:
        held = self._inner.enforcement
        if not self.is_limited:
            return held
        return msgspec.structs.replace(held, amounts={**held.amounts, KIND: "loop-mount"})

    def probe(self) -> str:
        """Why sizes cannot be limited here, or nothing. Raises SettingsError where nothing can be kept."""
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            trial = Path(tempfile.mkdtemp(prefix=f"{self._prefix}probe-", dir=self._path))
        except OSError as error:
            raise SettingsError(f"node.cache_path: nothing can be kept there: {error}") from error
        try:
            missing = [tool for tool in (_MAKE[0], "mount") if shutil.which(tool) is None]
            if missing:
                return f"not installed: {', '.join(missing)}"
            self._mount(trial, _PROBE_BYTES)
            self.is_limited = True
        except OSError as error:
            return str(error)
        finally:
            self._remove(trial)
        return ""

    def create(self, lease: LeaseId, share: Share, reserved: int = 0) -> Enforcement:
        enforcement = self._inner.create(lease, share, reserved)
        size_bytes = dict(share.amounts).get(KIND, 0)
        if size_bytes:
            self._make(self._directory(lease), size_bytes)
        return enforcement

    def destroy(self, lease: LeaseId) -> None:
        self._inner.destroy(lease)
        self._remove(self._directory(lease))

    def sweep(self) -> None:
        self._inner.sweep()
        for directory in self._ours(GROUP_PREFIX):
            owner = directory / "owner"
            with contextlib.suppress(OSError):  # the next agent tries again
                if owner.is_symlink() and not owner.exists():
                    self._remove(directory)

    def remains(self) -> list[LeaseId]:
        names = (path.name.removeprefix(self._prefix) for path in self._ours(self._prefix))
        return sorted({*self._inner.remains(), *map(LeaseId, names)})

    def _ours(self, prefix: str) -> Iterator[Path]:
        for directory in self._path.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):  # another agent removed it
                if is_ours(directory):
                    yield directory

    def _directory(self, lease: LeaseId) -> Path:
        return self._path / f"{self._prefix}{lease}"

    def _make(self, directory: Path, size_bytes: int) -> None:
        """What is there already stays: an adopted lease finds what it had."""
        directory.mkdir(mode=0o700, exist_ok=True)
        if not is_ours(directory):
            raise PermissionError(f"{directory} is there already and is not this user's alone; remove it")
        with contextlib.suppress(FileExistsError):
            (directory / "owner").symlink_to(self._state)
        if self.is_limited:
            self._mount(directory, size_bytes)
        else:
            (directory / "data").mkdir(mode=0o700, exist_ok=True)

    def _mount(self, directory: Path, size_bytes: int) -> None:
        image, data = directory / "image", directory / "data"
        data.mkdir(mode=0o700, exist_ok=True)
        if data.is_mount():
            return
        with image.open("wb") as file:
            file.truncate(size_bytes)
        run(*_MAKE, str(image), limit_s=COMMAND_S)
        run("mount", "-o", "loop,nosuid,nodev,discard", str(image), str(data), limit_s=COMMAND_S)
        data.chmod(0o700)
        with contextlib.suppress(OSError):
            (data / "lost+found").rmdir()

    def _remove(self, directory: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            if is_ours(directory):
                _unmount(directory / "data")
                shutil.rmtree(directory)


def cache_of(lease: LeaseId, path: Path, tag: str) -> Path:
    """What the functions of a lease with cache are given."""
    return path / f"{GROUP_PREFIX}{tag}-{lease}" / "data"


def _unmount(data: Path) -> None:
    """Not by umount(8), which follows links: whatever they led to would be unmounted."""
    if data.is_symlink() or not data.is_mount():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_NOFOLLOW, _NOFOLLOW | _DETACH):  # somebody may look at it from outside the lease
        if libc.umount2(os.fsencode(data), flags) == 0:
            return
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(data))
