"""Cache: a directory on the node's own disk for each lease, no larger than it asked for.

    PATH/isthmus-TAG-LEASE/
        owner   link to the state directory of the agent that made it
        image   a file system of that size in a sparse file, where such may be mounted
        data    what functions are given: the file system, or else a plain directory of any size

Invariant: it goes with its lease. What an agent left whose state directory is no more (that of a job that was
killed) goes when the next agent starts here.
Source: mke2fs(8), mount(8), the loop device.
"""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import msgspec

from isthmus.core.errors import SettingsError
from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.node.isolation.isolation import GROUP_PREFIX, Isolation, Share
from isthmus.node.isolation.layers import Layer

KIND = "cache"
COMMAND_S = 60.0  # a slow disk writes the tables of a large file system
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
            trial = self._path / f"{self._prefix}probe"
            self._remove(trial)
            trial.mkdir(mode=0o700)
        except OSError as error:
            raise SettingsError(f"node.cache_path: nothing can be kept there: {error}") from error
        try:
            missing = [tool for tool in (_MAKE[0], "mount", "umount") if shutil.which(tool) is None]
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
        for directory in self._path.glob(f"{GROUP_PREFIX}*"):
            owner = directory / "owner"
            if owner.is_symlink() and not owner.exists():
                with contextlib.suppress(OSError):  # somebody else's: their agents see to it
                    self._remove(directory)

    def remains(self) -> list[LeaseId]:
        names = (path.name.removeprefix(self._prefix) for path in self._path.glob(f"{self._prefix}*"))
        return sorted({*self._inner.remains(), *map(LeaseId, names)})

    def _directory(self, lease: LeaseId) -> Path:
        return self._path / f"{self._prefix}{lease}"

    def _make(self, directory: Path, size_bytes: int) -> None:
        """What is there already stays: an adopted lease finds what it had."""
        directory.mkdir(mode=0o700, exist_ok=True)
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
        _run(*_MAKE, str(image))
        _run("mount", "-o", "loop,nosuid,nodev,discard", str(image), str(data))
        data.chmod(0o700)
        with contextlib.suppress(OSError):
            (data / "lost+found").rmdir()

    def _remove(self, directory: Path) -> None:
        if not directory.exists():
            return
        data = directory / "data"
        if data.is_mount():
            try:
                _run("umount", str(data))
            except OSError:
                _run("umount", "--lazy", str(data))  # somebody looks at it from outside the lease
        shutil.rmtree(directory)


def cache_of(lease: LeaseId, path: Path, tag: str) -> Path:
    """What the functions of a lease with cache are given."""
    return path / f"{GROUP_PREFIX}{tag}-{lease}" / "data"


def _run(*command: str) -> None:
    """Raises OSError with the command's words."""
    environ = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_S, check=False, env=environ
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} takes longer than {COMMAND_S:g} s") from error
    if done.returncode:
        raise OSError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
