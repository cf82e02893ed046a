"""An isolation on top of another: all that it does not do itself, the inner one does."""

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
