"""The network between one life of the site and the agents: it delays, loses, doubles and reorders, and it
breaks.

It is also the site's `NodeControl`. Orders are answered by tasks of the agent's, so that a site that crashes
does not take back what it ordered.
"""

import asyncio
import random

import msgspec

from isthmus.core import errors
from isthmus.core.ids import NodeId
from isthmus.leasing import Leasing
from isthmus.node.messages import Done, Failed, Order
from tests.simulation.agents import AgentTwin, Report

ORDER_TIMEOUT_S = 8.0
LOSS = 0.01
DOUBLE = 0.03
REORDER = 0.05
DELAY_S = 0.05
HEARTBEAT_S = 2.0


class Link:
    """One connection of one agent. `closed` is set when it breaks, whoever broke it."""

    def __init__(self, agent: AgentTwin) -> None:
        self.agent = agent
        self.life = agent.life
        self.closed = asyncio.Event()


class Network:
    """All connections of one life of the site."""

    def __init__(self, chance: random.Random, is_calm: bool = False) -> None:
        self._chance = chance
        self._links: dict[NodeId, Link] = {}
        self._numbers = 0
        self.is_down = False
        self.is_calm = is_calm  # delays only: faults are over

    async def order(self, node: NodeId, order: Order) -> Done:
        link = self._links.get(node)
        if link is None or self.is_down:
            raise errors.SiteUnavailableError(f"node {node} has no connected agent")
        self._numbers += 1
        numbered = msgspec.structs.replace(order, number=self._numbers)
        deliveries = 2 if self._happens(DOUBLE) else 1
        answers = [asyncio.ensure_future(self._deliver(link, numbered)) for _ in range(deliveries)]
        broken = asyncio.ensure_future(link.closed.wait())
        done, _ = await asyncio.wait(
            [answers[0], broken], timeout=ORDER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        broken.cancel()
        if answers[0] not in done or self.is_down or self._happens(LOSS):
            raise errors.SiteUnavailableError(f"node {node} did not answer {type(order).__name__}")
        answer = answers[0].result()
        if answer is None:
            raise errors.SiteUnavailableError(f"node {node} hung up")
        if isinstance(answer, Failed):
            raise getattr(errors, answer.code)(answer.message)
        return answer

    async def _deliver(self, link: Link, order: Order) -> Done | Failed | None:
        await asyncio.sleep(self._delay_s())
        if (
            link.closed.is_set()
            or not link.agent.is_up
            or link.life != link.agent.life
            or self._happens(LOSS)
        ):
            await asyncio.sleep(ORDER_TIMEOUT_S)
            return None
        answer = await link.agent.carry_out(order)
        await asyncio.sleep(self._delay_s())
        return answer

    async def serve(self, agent: AgentTwin, leasing: Leasing) -> None:
        """One connection from hello to its end. Raises nothing of the site's: then the connection broke."""
        link = Link(agent)
        node = agent.node.node
        if node in self._links:
            self._links[node].closed.set()
        self._links[node] = link
        try:
            await asyncio.sleep(self._delay_s())
            await leasing.agent_joined(node, agent.hello())
            await self._report(link, leasing)
        except errors.IsthmusError:
            pass  # the site could not take it in: it hangs up, and the agent dials again
        finally:
            link.closed.set()
            if self._links.get(node) is link:
                del self._links[node]
                if not self.is_down:
                    await leasing.agent_left(node)

    async def _report(self, link: Link, leasing: Leasing) -> None:
        agent = link.agent
        while not self.is_down and agent.is_up and link.life == agent.life and not link.closed.is_set():
            beat = agent.heartbeat()
            batch: list[Report] = [*agent.reports, beat]
            if len(batch) > 1 and self._happens(REORDER):
                batch[-1], batch[-2] = batch[-2], batch[-1]
            for report in batch:
                await asyncio.sleep(self._delay_s())
                if self.is_down or link.closed.is_set() or self._happens(LOSS):
                    return  # a lost report is a broken connection
                for _ in range(2 if self._happens(DOUBLE) else 1):
                    await leasing.agent_report(agent.node.node, report)
                if report in agent.reports:
                    agent.reports.remove(report)
            await asyncio.sleep(HEARTBEAT_S)

    def break_link(self, node: NodeId) -> None:
        link = self._links.get(node)
        if link is not None:
            link.closed.set()

    def _happens(self, probability: float) -> bool:
        return not self.is_calm and self._chance.random() < probability

    def _delay_s(self) -> float:
        return self._chance.expovariate(1 / DELAY_S)
