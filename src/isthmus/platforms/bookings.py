"""Who holds what of which node and of the site, for platforms that are their own book-keepers.

Invariant: what is booked never exceeds what there is; booking under a known id changes nothing.
"""

from collections.abc import Mapping

from isthmus.core import kinds
from isthmus.core.errors import NoCapacityError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.kinds import Stock
from isthmus.core.model import Node, Resources
from isthmus.platforms.platform import Allocation, AllocationState


class Bookings:
    def __init__(self, nodes: tuple[Node, ...], licenses: Mapping[str, int] | None = None) -> None:
        self.nodes = nodes
        self.stocks = {kind: Stock(total=count) for kind, count in kinds.amounts(licenses or {}).items()}
        self._held: dict[AllocationId, Allocation] = {}

    def holds(self, allocation: AllocationId) -> bool:
        return allocation in self._held

    def held(self, allocation: AllocationId) -> Allocation | None:
        return self._held.get(allocation)

    def book(self, allocation: AllocationId, node: NodeId, resources: Resources) -> Allocation:
        """Raises NoCapacityError when the node is unknown, or has not that much left."""
        known = self._held.get(allocation)
        if known is not None:
            return known
        machine = next((candidate for candidate in self.nodes if candidate.node == node), None)
        if machine is None:
            raise NoCapacityError(f"there is no node {node!r}")
        held = [other.resources for other in self._held.values() if other.node == node]
        free_cores = machine.cores - sum(other.cores for other in held)
        free_bytes = machine.memory_bytes - sum(other.memory_bytes for other in held)
        free_gpus = machine.gpus - sum(other.gpus for other in held)
        need = (resources.cores, resources.memory_bytes, resources.gpus)
        free = (free_cores, free_bytes, free_gpus)
        if any(want > have for want, have in zip(need, free, strict=True)):
            left = f"{free_cores} cores, {free_bytes} bytes of memory and {free_gpus} GPUs"
            raise NoCapacityError(f"node {node} has {left} free, not {resources}")
        self._check_further(machine, resources)
        taken = Allocation(allocation=allocation, node=node, state="running", resources=resources)
        self._held[allocation] = taken
        return taken

    def _check_further(self, machine: Node, resources: Resources) -> None:
        for kind, need in resources.amounts.items():
            is_site_wide = kinds.is_site_wide(kind)
            holders = [one for one in self._held.values() if is_site_wide or one.node == machine.node]
            taken = sum(one.resources.amounts.get(kind, 0) for one in holders)
            stock = self.stocks.get(kind, Stock(total=0))
            there = stock.total if is_site_wide else machine.amounts.get(kind, 0)
            if need > there - taken:
                held, most, asked = (kinds.number(kind, amount) for amount in (taken, there, need))
                raise NoCapacityError(f"{held} of {most} {kinds.noun(kind)} are held, and {asked} are needed")

    def free(self, allocation: AllocationId) -> None:
        self._held.pop(allocation, None)

    def states(self) -> dict[AllocationId, AllocationState]:
        return {allocation: held.state for allocation, held in self._held.items()}

    def clear(self) -> None:
        self._held.clear()
