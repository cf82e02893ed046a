"""Pure: which lease holds which cores and how much memory of this node.

Invariant: a core belongs to at most one lease, and the memory of all leases fits the node. A lease that does
not fit is refused here, whatever the site believes. Where a batch job lends its cores, harvested leases share
them all, and their number is what fits.
"""

import msgspec

from isthmus.core import kinds
from isthmus.core.errors import NoCapacityError
from isthmus.core.ids import LeaseId
from isthmus.core.model import Resources
from isthmus.core.units import format_bytes
from isthmus.node.isolation import Share


class Capacity(msgspec.Struct, frozen=True):
    """What may be leased on this node in all.

    lent_cores  so many of `cores`, which belong to a batch job, and to harvested leases while it idles; 0:
                the cores are for leases
    """

    cores: tuple[int, ...]
    memory_bytes: int
    gpus: int = 0
    lent_cores: int = 0
    amounts: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.lent_cores or len(self.cores)


class Allotments:
    """The shares of all leases on this node."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity = capacity
        self._shares: dict[LeaseId, Share] = {}

    def take(self, lease: LeaseId, resources: Resources) -> Share:
        """The same lease again gets the same share. Raises NoCapacityError."""
        if lease in self._shares:
            return self._shares[lease]
        free = self.free_cores()
        if resources.cores > len(free):
            raise NoCapacityError(
                f"{lease} needs {resources.cores} cores, {len(free)} of {self.capacity.count} are free here"
            )
        free_bytes = self.free_memory_bytes()
        if resources.memory_bytes > free_bytes:
            raise NoCapacityError(
                f"{lease} needs {format_bytes(resources.memory_bytes)} of memory, "
                f"{format_bytes(free_bytes)} of {format_bytes(self.capacity.memory_bytes)} are free here"
            )
        if resources.gpus > self.capacity.gpus:
            raise NoCapacityError(f"{lease} needs {resources.gpus} GPUs, this node has {self.capacity.gpus}")
        bound = kinds.of_node(resources.amounts)
        for kind, need in bound.items():
            left = self.capacity.amounts.get(kind, 0) - self._taken(kind)
            if need > left:
                words = f"{kinds.number(kind, need)} {kinds.noun(kind)}, {kinds.number(kind, left)}"
                raise NoCapacityError(f"{lease} needs {words} are free here")
        share = self._share(resources, free)._replace(amounts=tuple(bound.items()))
        self._shares[lease] = share
        return share

    def restore(self, lease: LeaseId, share: Share) -> None:
        """Put back what an adopted lease holds."""
        self._shares[lease] = share

    def give_back(self, lease: LeaseId) -> None:
        self._shares.pop(lease, None)

    def _share(self, resources: Resources, free: tuple[int, ...]) -> Share:
        if self.capacity.lent_cores:
            return Share(self.capacity.cores, resources.memory_bytes, resources.cores)
        return Share(free[: resources.cores], resources.memory_bytes)

    def _taken(self, kind: str) -> int:
        return sum(dict(share.amounts).get(kind, 0) for share in self._shares.values())

    def free_cores(self) -> tuple[int, ...]:
        """Of lent cores only the number says something."""
        if self.capacity.lent_cores:
            lent = self.capacity.lent_cores - sum(share.idle_cores for share in self._shares.values())
            return self.capacity.cores[:lent]
        taken = {core for share in self._shares.values() for core in share.cores}
        return tuple(core for core in self.capacity.cores if core not in taken)

    def free_memory_bytes(self) -> int:
        return self.capacity.memory_bytes - sum(share.memory_bytes for share in self._shares.values())


def end_ns(deadline_ns: int, orphan_ns: int, clients: int, site_connected: bool) -> int:
    """When a lease must end: later only where the site is away and a client still uses it."""
    return deadline_ns if site_connected or not clients else deadline_ns + orphan_ns
