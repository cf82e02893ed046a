"""Which nodes there are, whose agent is connected, silent or unknown, and which are being drained.

An agent goes by the name of its node, or, where each allocation brings its own, by the allocation's. The
agent of a lent node brings the node itself: the part of a batch job that the job leaves idle.

Invariant: unknown is not gone. A platform that cannot answer leaves the list as it was; a silent agent only
closes its node to new leases.
"""

import msgspec

from isthmus.core.ids import NodeId
from isthmus.core.model import LENT_PLATFORM, Enforcement, Node
from isthmus.node.owners import Lent
from isthmus.node.slack import Slack
from isthmus.policy.snapshot import NodeRow, empty_row

LENT_SILENCE_S = 3.0  # more than a heartbeat, and time enough to dial again


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
        self._lent: dict[NodeId, Node] = {}
        self._agents: dict[NodeId, _Agent] = {}
        self.draining = draining

    def set_nodes(self, nodes: tuple[Node, ...]) -> bool:
        """Take the platform's list; whether it differs from the one before."""
        latest = {node.node: node for node in nodes}
        latest |= self._lent
        changed = latest != self._nodes
        self._nodes = latest
        return changed

    def lend(self, node: NodeId, lent: Lent) -> bool:
        """A batch job lends a node that it had not lent yet; False: that name is taken."""
        if node in self._nodes:
            return False
        self._lent[node] = self._nodes[node] = lent_node(node, lent)
        return True

    def lent(self, node: NodeId | None) -> Node | None:
        """The lent node of this name, if it is one."""
        return None if node is None else self._lent.get(node)

    def set_slack(self, node: NodeId, slack: Slack) -> tuple[int, int]:
        """How many cores and bytes more (or fewer) are free on a lent node than before."""
        before = self._lent.get(node)
        if before is None:
            return 0, 0
        cores = before.cores - max(0, min(slack.cores, before.cores))
        memory_bytes = before.memory_bytes - max(0, min(slack.memory_bytes, before.memory_bytes))
        after = msgspec.structs.replace(before, other_cores=cores, other_memory_bytes=memory_bytes)
        self._lent[node] = self._nodes[node] = after
        return before.other_cores - cores, before.other_memory_bytes - memory_bytes

    def forget_lent(self, node: NodeId) -> bool:
        """The job's agent is gone and nothing of ours runs there; False: it was no lent node."""
        if self._lent.pop(node, None) is None:
            return False
        del self._nodes[node]
        self._agents.pop(node, None)
        return True

    def abandoned(self, now: float) -> list[NodeId]:
        """Lent nodes whose agent hung up and has not come back: their executors ended with it."""
        return [
            node
            for node in self._lent
            if not self._agents[node].is_connected and now - self._agents[node].heard_at > LENT_SILENCE_S
        ]

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


def lent_node(node: NodeId, lent: Lent) -> Node:
    """The idle part of a job as a node. Nothing of it is free until its agent has measured."""
    labels = {"job": lent.job, "name": lent.name, "node": lent.node, "user": lent.user}
    labels |= {"account": lent.account, "partition": lent.partition, "qos": lent.qos}
    return Node(
        node=node,
        platform=LENT_PLATFORM,
        cores=lent.cores,
        memory_bytes=lent.memory_bytes,
        labels=labels,
        other_cores=lent.cores,
        other_memory_bytes=lent.memory_bytes,
    )
