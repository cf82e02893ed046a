"""A site without HTTP in a room of its own: real leasing, policy and ledger, obedient agents, virtual
time.
"""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import IsthmusError, SiteUnavailableError
from isthmus.core.ids import ExecutorId, LeaseId, NodeId, TenantId
from isthmus.core.model import (
    EndReason,
    Enforcement,
    ExecutorInfo,
    LeaseState,
    Node,
    Principal,
    Quota,
    Resources,
    Usage,
)
from isthmus.core.settings import LeasingSettings, PoolSettings
from isthmus.leasing import Leasing, Ledger
from isthmus.node.messages import (
    AddExecutor,
    AgentHello,
    Done,
    EndLease,
    Heartbeat,
    KillExecutor,
    LeaseEnded,
    LeaseReport,
    Order,
    RunningLease,
    StartLease,
)
from isthmus.platforms import MemoryPlatform
from isthmus.policy import ALLOW_ALL, PolicySet
from tests.simulation.virtual_time import VirtualClock, VirtualLoop, run_virtually

SETTINGS = LeasingSettings(
    lease_s=30.0,
    grace_s=2.0,
    tick_s=0.5,
    agent_silence_s=10.0,
    orphan_s=60.0,
    queue_max=3,
    queue_wait_s=60.0,
    pools={
        "default": PoolSettings(idle_s=300.0),
        "two": PoolSettings(maximum=2),
        "warm": PoolSettings(minimum=3),
    },
)
ALICE = Principal(tenant=TenantId("alice"))
BOB = Principal(tenant=TenantId("bob"))
ADMIN = Principal(tenant=TenantId("ops"), role="admin")
ONE = LeaseRequest(resources=Resources(cores=1))
FOUR = LeaseRequest(resources=Resources(cores=4))


class ObedientAgents:
    """A NodeControl that does as it is told at once. `fail_next` makes orders of a kind raise, once each."""

    def __init__(self) -> None:
        self.given: list[tuple[NodeId, Order]] = []
        self.running: dict[LeaseId, ExecutorInfo] = {}
        self.fail_next: dict[type[Order], list[IsthmusError]] = {}
        self.takes_s: dict[type[Order], float] = {}
        self.is_cut_off = False

    async def order(self, node: NodeId, order: Order) -> Done:
        self.given.append((node, order))
        await asyncio.sleep(self.takes_s.get(type(order), 0.0))
        failures = self.fail_next.get(type(order))
        if failures:
            raise failures.pop(0)
        if self.is_cut_off:
            raise SiteUnavailableError(f"node {node} has no connected agent")
        match order:
            case StartLease() | AddExecutor():
                number = len(self.given)
                info = ExecutorInfo(
                    executor=ExecutorId(f"ex_{number}"), address=f"unix:/{number}", pid=number
                )
                self.running[order.lease] = info
                return Done(number=0, executor=info, enforcement=Enforcement())
            case EndLease():
                self.running.pop(order.lease, None)
            case KillExecutor():
                return Done(number=0, killed=True)
        return Done(number=0)

    def orders(self, kind: type[Order]) -> list[Any]:
        return [order for _, order in self.given if isinstance(order, kind)]


def machines(count: int = 1, cores: int = 4) -> tuple[Node, ...]:
    return tuple(
        Node(node=NodeId(f"n{i}"), platform="memory", cores=cores, memory_bytes=64 * 2**30)
        for i in range(count)
    )


class Room:
    """One site and its nodes. `restart` puts another site on the same ledger, as after a kill."""

    def __init__(
        self,
        loop: VirtualLoop,
        path: Path,
        nodes: tuple[Node, ...],
        policies: PolicySet,
        settings: LeasingSettings,
    ) -> None:
        self.loop = loop
        self.clock = VirtualClock(loop)
        self.platform = MemoryPlatform(nodes, settings.licenses)
        self.agents = ObedientAgents()
        self.path = path
        self.settings = settings
        self.policies = policies
        self._build()

    def _build(self) -> None:
        self.ledger = Ledger(self.path)
        self.leasing = Leasing(
            self.settings, self.ledger, self.platform, self.agents, self.policies, self.clock, b"k" * 32
        )
        self.running = self.loop.create_task(self.leasing.run())

    def restart(self) -> None:
        """Nothing of the old site reaches its ledger any more."""
        self.running.cancel()
        self.ledger.close()
        self._build()

    async def join(self, *running: RunningLease) -> None:
        """Every node's agent connects, offering what runs there to be adopted."""
        for node in await self.platform.nodes():
            await self.leasing.agent_joined(node.node, hello(node, *running))

    async def beat(self, idle_s: float = 0.0, usage: Usage = Usage(), draining: bool = False) -> None:
        """A heartbeat of every node, reporting all that runs there."""
        leases = {lease.lease: lease.node for lease in self.leasing.leases(ADMIN, ended=False)}
        for node in await self.platform.nodes():
            reports = tuple(
                LeaseReport(lease=lease, usage=usage, idle_s=idle_s, draining=draining)
                for lease in self.agents.running
                if leases.get(lease, node.node) == node.node
            )
            await self.leasing.agent_report(node.node, Heartbeat(leases=reports))

    async def beat_for(self, duration_s: float) -> None:
        """Time passes, and agents are heard."""
        until = self.loop.time() + duration_s
        while self.loop.time() < until:
            await self.beat()
            await self.clock.sleep(1.0)

    async def tell_end(
        self, lease: LeaseId, reason: EndReason, detail: str = "", usage: Usage = Usage()
    ) -> None:
        self.agents.running.pop(lease, None)
        node = self.leasing.lease(ADMIN, lease).node
        assert node is not None
        await self.leasing.agent_report(
            node, LeaseEnded(lease=lease, reason=reason, detail=detail, usage=usage)
        )


def hello(node: Node, *running: RunningLease) -> AgentHello:
    return AgentHello(
        node=node.node, nonce=b"", proof=b"", version="0", python="cpython-3.11", hostname="h", pid=1,
        cores=node.cores, memory_bytes=node.memory_bytes, gpus=0, enforcement=Enforcement(), running=running,
    )  # fmt: skip


Story = Callable[[Room], Coroutine[Any, Any, None]]


def in_a_room(
    nodes: int = 1, policies: PolicySet = ALLOW_ALL, settings: LeasingSettings = SETTINGS, joined: bool = True
) -> Callable[[Story], Callable[[Path], None]]:
    """Makes a test of a story that is told in a room of its own, in virtual time."""

    def decorate(story: Story) -> Callable[[Path], None]:
        @functools.wraps(story)
        def test(tmp_path: Path) -> None:
            loop = VirtualLoop()
            run_virtually(
                loop, _tell(story, loop, tmp_path / "ledger.sqlite3", nodes, policies, settings, joined)
            )

        del test.__wrapped__  # pytest must see the parameters of the test, not those of the story
        return test

    return decorate


async def _tell(
    story: Story,
    loop: VirtualLoop,
    path: Path,
    nodes: int,
    policies: PolicySet,
    settings: LeasingSettings,
    joined: bool,
) -> None:
    room = Room(loop, path, machines(nodes), policies, settings)
    try:
        await room.clock.sleep(0.1)
        if joined:
            await room.join()
        await story(room)
    finally:
        room.running.cancel()
        await room.leasing.close()
        room.ledger.close()


def limited(**quota: int) -> Principal:
    return Principal(tenant=TenantId("alice"), quota=Quota(**quota))


def patient(request: LeaseRequest, wait_s: float = 30.0, **changes: object) -> LeaseRequest:
    """The same request, changed, of somebody who waits."""
    fields = {field: getattr(request, field) for field in request.__struct_fields__}
    return LeaseRequest(**{**fields, "wait_s": wait_s, **changes})


async def granted(room: Room, who: Principal = ALICE, request: LeaseRequest = ONE) -> LeaseId:
    return (await room.leasing.request(who, request)).grants[0].lease


def end_of(room: Room, lease: LeaseId) -> tuple[LeaseState, EndReason | None]:
    found = room.leasing.lease(ADMIN, lease)
    return found.state, found.end_reason


def running_lease(room: Room, lease: LeaseId) -> RunningLease:
    """What an agent says of a lease that runs on it."""
    known = room.agents.running.get(lease)
    return RunningLease(
        lease=lease, executors=(known,) if known else (), deadline_s=room.clock.now() + 30.0, usage=Usage()
    )
