"""The seam between leases and the agents that enforce them: one order out, its answer back.

Implemented over WebSockets by `isthmus.gateway`; the in-memory twin lives in `tests/simulation`.
"""

from typing import Protocol

from isthmus.core.ids import NodeId
from isthmus.node.messages import Done, Order


class NodeControl(Protocol):
    async def order(self, node: NodeId, order: Order) -> Done:
        """Deliver one order to the node's agent and wait for its answer; `order.number` is assigned here.

        Raises the typed error that a `Failed` answer names (the agent did nothing), or SiteUnavailableError
        when the agent is not connected or does not answer in time: then the order may or may not have been
        carried out.
        """
        ...
