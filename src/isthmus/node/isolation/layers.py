"""An isolation on top of another: all that it does not do itself, the inner one does. And `run`, for the
commands of the system that it does its part with.
"""

import os
import subprocess
from pathlib import Path

from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement
from isthmus.node.isolation.isolation import Consumption, Isolation, Share


class Layer:
    def __init__(self, inner: Isolation) -> None:
        self._inner = inner

    @property
    def mechanism(self) -> str:
        return self._inner.mechanism

    @property
    def enforcement(self) -> Enforcement:
        return self._inner.enforcement

    def probe(self) -> str:
        return self._inner.probe()

    def reserve(self, pid: int) -> None:
        self._inner.reserve(pid)

    def create(self, lease: LeaseId, share: Share, reserved: int = 0) -> Enforcement:
        return self._inner.create(lease, share, reserved)

    def attach(self, lease: LeaseId, pid: int) -> None:
        self._inner.attach(lease, pid)

    def group(self, lease: LeaseId) -> Path | None:
        return self._inner.group(lease)

    def consumption(self, lease: LeaseId) -> Consumption:
        return self._inner.consumption(lease)

    def oom_kills(self, lease: LeaseId) -> int:
        return self._inner.oom_kills(lease)

    def freeze(self, lease: LeaseId) -> None:
        self._inner.freeze(lease)

    def thaw(self, lease: LeaseId) -> None:
        self._inner.thaw(lease)

    def destroy(self, lease: LeaseId) -> None:
        self._inner.destroy(lease)

    def sweep(self) -> None:
        self._inner.sweep()

    def remains(self) -> list[LeaseId]:
        return self._inner.remains()


class RefusedError(OSError):
    """A command of the system failed; `complaint` is what it said."""

    def __init__(self, command: str, complaint: str) -> None:
        super().__init__(f"`{command}`: {complaint}")
        self.complaint = complaint


def run(*command: str, limit_s: float) -> str:
    """What it says, in English. Raises RefusedError, OSError when it takes longer or is not there."""
    words = " ".join(command)
    environ = {**os.environ, "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, check=False, env=environ
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"`{words}` takes longer than {limit_s:g} s") from error
    if done.returncode:
        raise RefusedError(words, " ".join(done.stderr.split()) or f"exit code {done.returncode}")
    return done.stdout
