"""The twin: a platform of made-up nodes in memory, with faults on demand, for tests and simulation."""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from isthmus.core.api import PoolReport
from isthmus.core.errors import NoCapacityError, SiteUnavailableError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.kinds import Stock
from isthmus.core.model import LeaseClass, Node, Resources
from isthmus.platforms.bookings import Bookings
from isthmus.platforms.platform import Allocation, AllocationState


class MemoryPlatform:
    """
    is_unreachable  every call raises SiteUnavailableError, and `allocations` cannot tell
    answers         cleared, `nodes` does not return
    is_full         `acquire` refuses new allocations, whatever is free
    """

    name = "memory"
    survey_s = 10.0

    def __init__(self, nodes: tuple[Node, ...] = (), licenses: Mapping[str, int] | None = None) -> None:
        self._bookings = Bookings(nodes, licenses)
        self._preempted: dict[AllocationId, AllocationState] = {}
        self._wanted_back: dict[AllocationId, str] = {}
        self.wanted: tuple[Resources, ...] = ()
        self.answers = asyncio.Event()
        self.answers.set()
        self.is_unreachable = False
        self.is_full = False

    async def start(self) -> None:
        return

    async def nodes(self) -> tuple[Node, ...]:
        await self.answers.wait()
        self._reach()
        return self._bookings.nodes

    async def stocks(self) -> dict[str, Stock]:
        self._reach()
        return self._bookings.stocks

    async def acquire(
        self, allocation: AllocationId, node: NodeId, resources: Resources, lease_class: LeaseClass
    ) -> Allocation:
        self._reach()
        if self.is_full and not self._bookings.holds(allocation):
            raise NoCapacityError(f"node {node} is full, because a test says so")
        return self._bookings.book(allocation, node, resources)

    async def release(self, allocation: AllocationId) -> None:
        self._reach()
        self._preempted.pop(allocation, None)
        self._wanted_back.pop(allocation, None)
        self._bookings.free(allocation)

    async def allocations(self) -> dict[AllocationId, AllocationState] | None:
        if self.is_unreachable:
            return None
        leaving: dict[AllocationId, AllocationState] = dict.fromkeys(self._wanted_back, "leaving")
        return {**self._bookings.states(), **leaving, **self._preempted}

    def agent_of(self, allocation: AllocationId, node: NodeId) -> NodeId | None:
        return None

    async def fate(self, allocation: AllocationId, node: NodeId) -> Allocation | None:
        held = self._bookings.held(allocation)
        if held is None or allocation not in self._wanted_back:
            return held
        return msgspec.structs.replace(held, state="leaving", detail=self._wanted_back[allocation])

    def want(self, waiting: Sequence[Resources]) -> None:
        self.wanted = tuple(waiting)

    def pools(self) -> tuple[PoolReport, ...]:
        return ()

    async def close(self) -> None:
        self._bookings.clear()

    def preempt(self, allocation: AllocationId) -> None:
        """Take it back, as a batch system does when its owner comes."""
        self._bookings.free(allocation)
        self._preempted[allocation] = "ended"

    def want_back(self, allocation: AllocationId, why: str) -> None:
        """Have it handed back, in order."""
        self._wanted_back[allocation] = why

    def _reach(self) -> None:
        if self.is_unreachable:
            raise SiteUnavailableError("the platform does not answer, because a test says so")
