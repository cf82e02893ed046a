"""The seam between leases and the outside world they are drawn from: local machine, Slurm, Kubernetes.

`memory.MemoryPlatform` is the twin for tests and simulation; every platform passes
tests/conformance/test_platforms.py.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from isthmus.core.api import PoolReport
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.kinds import HeldBy, Stock
from isthmus.core.model import EndReason, LeaseClass, Node, Record, Resources

AllocationState = Literal["pending", "running", "suspended", "leaving", "ended"]
"""`suspended`: it stands still, and will go on; `leaving`: it is to be handed back soon."""


class Allocation(Record, frozen=True):
    """What the platform gave for one lease; on `local` it is a row in memory, on Slurm a job.

    closes_s    from then on (seconds since the epoch) it takes no calls: the platform ends it soon after
    end_reason  what its end means for the lease, and `detail` why, in words
    holds       what of site-wide kinds the platform itself keeps from others
    """

    allocation: AllocationId
    node: NodeId
    state: AllocationState
    resources: Resources
    closes_s: float = float("inf")
    end_reason: EndReason = EndReason.NODE_LOST
    detail: str = ""
    holds: dict[str, HeldBy] = msgspec.field(default_factory=dict)


class Platform(Protocol):
    """Calls are idempotent by allocation id. They raise NoCapacityError or SiteUnavailableError, nothing
    else.
    """

    name: str
    survey_s: float
    """How often it is worth asking for `nodes` and `allocations`."""

    async def start(self) -> None:
        """Make the platform usable: on `local`, start (and keep alive) the node's agent."""
        ...

    async def nodes(self) -> tuple[Node, ...]:
        """Every machine it could use, with what isthmus may lease there in all (free or not)."""
        ...

    async def stocks(self) -> dict[str, Stock]:
        """What there is of site-wide kinds, by name."""
        ...

    async def acquire(
        self, allocation: AllocationId, node: NodeId, resources: Resources, lease_class: LeaseClass
    ) -> Allocation:
        """Take `resources` on `node` under this id; the same id again gives the same answer."""
        ...

    async def release(self, allocation: AllocationId) -> None:
        """Give it back. Unknown ids are fine: releasing twice changes nothing."""
        ...

    async def allocations(self) -> dict[AllocationId, AllocationState] | None:
        """All it knows of, or None when it cannot tell now. Unknown is not gone: None changes nothing."""
        ...

    def agent_of(self, allocation: AllocationId, node: NodeId) -> NodeId | None:
        """The agent that comes and ends with the allocation; None: its node has one for all."""
        ...

    async def fate(self, allocation: AllocationId, node: NodeId) -> Allocation | None:
        """What has become of it, asked anew. Raises SiteUnavailableError; None: nothing can be said of it."""
        ...

    def want(self, waiting: Sequence[Resources]) -> None:
        """What elastic requests wait for, so that more may be fetched for them; nothing need come of it."""
        ...

    def pools(self) -> tuple[PoolReport, ...]:
        """How its pools of allocations stand, if it has some."""
        ...

    async def close(self) -> None: ...
