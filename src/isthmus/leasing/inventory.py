"""Which nodes there are, whose agent is connected, silent or unknown, and which are being drained.

An agent goes by the name of its node, or, where each allocation brings its own, by the allocation's.

Invariant: unknown is not gone. A platform that cannot answer leaves the list as it was; a silent agent only
closes its node to new leases.
"""

import msgspec

from isthmus.core.ids import NodeId
from isthmus.core.model import Enforcement, Node
from isthmus.policy.snapshot import NodeRow, empty_row


class _Agent:
    def __init__(self, heard_at: float) -> None:
        self.is_connected = False
        self.heard_at = heard_at
        self.enforcement = Enforcement()


class Inventory:
    """`heard_at` times are `clock.monotonic()` seconds."""

    def __init__(self, silence_s: float, draining: set[NodeId]) -> None:
        self._silence_s = silence_s
        self._nodes: dict[NodeId, Node] = {}
        self._agents: dict[NodeId, _Agent] = {}
        self.draining = draining

    def set_nodes(self, nodes: tuple[Node, ...]) -> bool:
        """Take the platform's list; whether it differs from the one before."""
        latest = {node.node: node for node in nodes}
        changed = latest != self._nodes
        self._nodes = latest
        return changed

    def knows(self, node: NodeId) -> bool:
        return node in self._nodes

    def joined(self, node: NodeId, enforcement: Enforcement, now: float) -> None:
        agent = self._agents.setdefault(node, _Agent(now))
        agent.is_connected = True
        agent.heard_at = now
        agent.enforcement = enforcement

    def left(self, node: NodeId) -> None:
        if node not in self._agents:
            return
        if node in self._nodes:
            self._agents[node].is_connected = False
        else:
            del self._agents[node]  # the agent of one allocation

    def heard(self, node: NodeId, now: float) -> None:
        if node in self._agents:
            self._agents[node].heard_at = now

    def is_audible(self, node: NodeId, now: float) -> bool:
        """Its agent is connected and has spoken lately."""
        agent = self._agents.get(node)
        return agent is not None and agent.is_connected and now - agent.heard_at <= self._silence_s

    def is_open(self, node: NodeId, now: float) -> bool:
        """It may get new leases."""
        known = self._nodes.get(node)
        if known is None or known.draining or node in self.draining:
            return False
        return known.agent == "on-demand" or self.is_audible(node, now)

    def audible(self, now: float) -> list[NodeId]:
        return [node for node in self._nodes if self.is_audible(node, now)]

    def rows(self, now: float) -> list[NodeRow]:
        return [empty_row(node, self.is_open(node.node, now)) for node in self._nodes.values()]

    def nodes(self, now: float) -> list[Node]:
        return [self._described(node, now) for node in self._nodes.values()]

    def _described(self, node: Node, now: float) -> Node:
        agent = self._agents.get(node.node)
        draining = node.draining or node.node in self.draining
        if agent is None:
            return msgspec.structs.replace(node, draining=draining)
        return msgspec.structs.replace(
            node,
            agent="connected" if self.is_audible(node.node, now) else "silent",
            enforcement=agent.enforcement,
            draining=draining,
        )
