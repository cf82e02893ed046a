"""A whole control plane in one virtual loop: a site that crashes and comes back, agents, clients, an
operator.

The real Leasing, policy and Ledger run; agents, network, platform and disk are twins that fail. Every choice
comes from one seeded source, so a seed is a complete description of what happens.
"""

import asyncio
import itertools
import logging
import random
import sqlite3
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import IsthmusError
from isthmus.core.ids import TenantId
from isthmus.core.model import LeaseClass, Principal, Quota, Resources
from isthmus.core.settings import LeasingSettings, PoolSettings
from isthmus.leasing import Leasing
from isthmus.platforms import MemoryPlatform
from isthmus.policy import load_policies
from tests.simulation.agents import BANDWIDTH, AgentTwin, nodes
from tests.simulation.ledgers import FaultyLedger
from tests.simulation.links import ORDER_TIMEOUT_S, Network
from tests.simulation.virtual_time import VirtualClock, VirtualLoop, run_virtually

CHAOS_S = 240.0  # of virtual time with faults
SETTINGS = LeasingSettings(
    lease_s=20.0,
    grace_s=2.0,
    tick_s=1.0,
    agent_silence_s=6.0,
    orphan_s=20.0,
    queue_max=4,
    queue_wait_s=30.0,
    licenses={"matlab": 3},
    pools={"default": PoolSettings(idle_s=90.0, minimum=1), "small": PoolSettings(maximum=3, idle_s=40.0)},
)
CALM_S = 4 * (SETTINGS.lease_s + SETTINGS.orphan_s + SETTINGS.agent_silence_s)
ANSWER_SLACK_S = 3 * ORDER_TIMEOUT_S  # an acquire, an order and a release may each take their time
POLICY = """
[fair]
half_life_h = 0.01

[tenants.paying]
weight = 3.0

[tenants.plain]
guarantee = { cores = 2, memory = "4GiB", licenses = { matlab = 1 } }

[tenants.guest]
lend = false
guarantee = { cores = 1, memory = "1GiB" }

[[rule]]
name = "large requests first"
when = "request.cores == 3"
then = "hurry"

[[rule]]
name = "the paying push the others out"
when = 'tenant.name == "paying" && request.class == "reserved"'
then = "allow"
preempt = true

[[rule]]
name = "the greedy are capped"
when = 'tenant.name == "greedy"'
then = "cap"
cores = 5

[[rule]]
name = "zone z1 first"
when = 'node.labels.zone == "z1"'
then = "prefer"

[[rule]]
name = "one node is not for guests"
when = 'tenant.name == "guest" && node.name == "n0"'
then = "deny"
"""
_WORLDS = itertools.count()
TENANTS = ("paying", "greedy", "guest", "plain")


class HangError(AssertionError):
    """A request was not answered within its wait."""


class SiteLife:
    """The site from one start to one crash (or to the end)."""

    def __init__(self, world: "World") -> None:
        self.ledger = FaultyLedger(
            world.database, world.chance, lambda: world.loop.call_soon(world.crash_site)
        )
        self.ledger.is_calm = world.is_calm
        self.network = Network(world.chance, world.is_calm)
        self.leasing = Leasing(
            SETTINGS,
            self.ledger,
            world.platform,
            self.network,
            world.policies,
            world.clock,
            b"k" * 32,
            world.new_id,
        )
        self.tasks: list[asyncio.Task[Any]] = []
        self.spawn(self.leasing.run())

    def spawn(self, act: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(act)
        task.add_done_callback(_forget)
        self.tasks = [other for other in self.tasks if not other.done()]
        self.tasks.append(task)
        return task

    def kill(self) -> None:
        """From this instant on nothing the site does reaches the disk or the network."""
        self.ledger.is_dead = True
        self.network.is_down = True
        for node in list(self.network._links):
            self.network.break_link(node)
        for task in self.tasks:
            task.cancel()


def _forget(task: asyncio.Task[Any]) -> None:
    """What became of a task whose client left, or whose site died, interests nobody."""
    if not task.cancelled():
        task.exception()


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.trace: list[str] = []
        self.failure: BaseException | None = None
        self.policies = load_policies(POLICY)
        self.is_calm = False
        self.is_volatile = self.chance.random() < 0.5  # the platform forgets allocations when the site dies
        machines = nodes(self.chance.randint(1, 4))
        self.platform = MemoryPlatform(machines, SETTINGS.licenses)
        self.agents = [
            AgentTwin(node, self.clock, self.chance, SETTINGS.lease_s, SETTINGS.orphan_s) for node in machines
        ]
        self.partitioned: dict[str, None] = {}
        self.database = f"file:simulation{next(_WORLDS)}?mode=memory&cache=shared"  # never that of another
        self._keeper = sqlite3.connect(
            self.database, uri=True
        )  # the disk: it outlives every life of the site
        self._ids = 0
        self.site: SiteLife | None = None
        self.counts: dict[str, int] = {}

    # plumbing -----------------------------------------------------------------------------------------------
    def new_id(self, prefix: str) -> str:
        self._ids += 1
        return f"{prefix}_{self._ids:08d}"

    def note(self, what: str, about: object = "") -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        told = f"{self.loop.time():.6f} {what} {about}"
        self.trace.append(told.replace(self.database, "the disk"))  # whose name differs from run to run

    def run(self) -> None:
        """Raises what went wrong, else returns after everything has come to rest and agrees."""
        logged_before = structlog.get_config()
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        try:
            run_virtually(self.loop, self._main())
        finally:
            structlog.configure(**logged_before)
            self._keeper.close()
        if self.failure is not None:
            raise self.failure

    async def _main(self) -> None:
        self.start_site()
        self._watch(self._serve_agents())
        chaos = [self._watch(act) for act in (self._break_things(), self._operate())]
        chaos += [
            self._watch(self._be_client(TENANTS[i % len(TENANTS)])) for i in range(self.chance.randint(2, 8))
        ]
        await self._pass(CHAOS_S)
        for task in chaos:
            task.cancel()
        self._calm_down()
        await self._pass(CALM_S)
        if self.failure is None:
            self._check_rest()
        self._stop()

    async def _pass(self, duration_s: float) -> None:
        """Let time pass, looking at the invariants."""
        until = self.loop.time() + duration_s
        while self.loop.time() < until and self.failure is None:
            await asyncio.sleep(0.5)
            self._check_invariants()

    def _watch(self, act: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of the world itself: its failure is the simulation's."""
        task = asyncio.ensure_future(act)
        task.add_done_callback(self._note_failure)
        return task

    def _note_failure(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None and self.failure is None:
            self.failure = task.exception()

    # the site -----------------------------------------------------------------------------------------------
    def start_site(self) -> None:
        self.note("site starts")
        try:
            self.site = SiteLife(self)
        except IsthmusError as error:  # the disk was full: its supervisor tries again
            self.note("site cannot start", error)
            self.loop.call_later(1.0, self.start_site)

    def crash_site(self) -> None:
        site = self.site
        if site is None:
            return
        self.note("site crashes")
        self.site = None
        site.kill()
        self.loop.call_later(self.chance.uniform(0.1, 15.0), self._restart_site, site)

    def stop_site(self) -> None:
        """An operator stops it in good order, and starts it again."""
        site, self.site = self.site, None
        if site is not None:
            self.note("site stops")
            self._watch(self._close_site(site))

    async def _close_site(self, site: SiteLife) -> None:
        try:
            await site.leasing.close()
        except IsthmusError as error:
            self.note("site could not close", error)
        site.kill()
        self.loop.call_later(self.chance.uniform(0.1, 5.0), self._restart_site, site)

    def _restart_site(self, dead: SiteLife) -> None:
        dead.ledger.close()
        if self.is_volatile:
            self.loop.create_task(self.platform.close())
        if self.site is None:
            self.start_site()

    async def _serve_agents(self) -> None:
        """Every agent dials whenever it is up and the site can be reached."""
        connections: dict[str, asyncio.Task[None]] = {}
        while True:
            for agent in self.agents:
                name = agent.node.node
                task = connections.get(name)
                if task is not None and not task.done():
                    continue
                if task is not None:
                    self._check_connection(task)
                    del connections[name]
                if self.site is not None and agent.is_up and name not in self.partitioned:
                    connections[name] = self.site.spawn(self.site.network.serve(agent, self.site.leasing))
            await asyncio.sleep(self.chance.uniform(0.1, 1.0))

    def _check_connection(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            raise task.exception() or AssertionError

    # faults -------------------------------------------------------------------------------------------------
    async def _break_things(self) -> None:
        acts: list[Callable[[], None]] = [
            self._crash_agent, self._crash_agent, self._partition, self._partition, self._jump_clock,
            self.crash_site, self.stop_site, self._reboot, self._lose_platform, self._preempt,
        ]  # fmt: skip
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 8.0))
            self.chance.choice(acts)()

    def _crash_agent(self) -> None:
        agent = self.chance.choice(self.agents)
        self._stop_agent(agent, "agent crashes", agent.crash)

    def _reboot(self) -> None:
        agent = self.chance.choice(self.agents)
        self._stop_agent(agent, "node reboots", agent.reboot)

    def _stop_agent(self, agent: AgentTwin, what: str, stop: Callable[[], None]) -> None:
        self.note(what, agent.node.node)
        stop()
        if self.site is not None:
            self.site.network.break_link(agent.node.node)
        down_s = self.chance.choice((1.0, 5.0, 20.0, 70.0))
        self.loop.call_later(down_s, self._start_agent, agent, agent.life)

    def _start_agent(self, agent: AgentTwin, life: int) -> None:
        if agent.life == life:
            agent.is_up = True

    def _partition(self) -> None:
        """The node cannot be reached for a while; its agent and executors live on."""
        node = self.chance.choice(self.agents).node.node
        self.note("partition", node)
        self.partitioned[node] = None
        if self.site is not None:
            self.site.network.break_link(node)
        self.loop.call_later(self.chance.choice((1.0, 8.0, 30.0, 80.0)), self.partitioned.pop, node, None)

    def _jump_clock(self) -> None:
        self.clock.jump_s += self.chance.choice((-3600.0, -5.0, 5.0, 3600.0))
        self.note("clock jumps", self.clock.jump_s)

    def _lose_platform(self) -> None:
        self.note("platform unreachable")
        self.platform.is_unreachable = True
        self.loop.call_later(self.chance.uniform(0.5, 8.0), setattr, self.platform, "is_unreachable", False)

    def _preempt(self) -> None:
        known = list(self.platform._bookings.states())
        if known:
            allocation = self.chance.choice(known)
            self.note("platform ends an allocation", allocation)
            self.platform.preempt(allocation)

    def _calm_down(self) -> None:
        self.note("calm")
        self.is_calm = True
        self.platform.is_unreachable = False
        self.partitioned.clear()
        for agent in self.agents:
            agent.is_up = True
        if self.site is not None:
            self.site.network.is_calm = self.site.ledger.is_calm = True

    def _stop(self) -> None:
        if self.site is not None:
            self.site.kill()
            self.site.ledger.close()

    # people -------------------------------------------------------------------------------------------------
    async def _operate(self) -> None:
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 40.0))
            node = self.chance.choice(self.agents).node.node
            if self.site is None:
                continue
            leasing = self.site.leasing
            act = self.chance.choice((leasing.drain_node, leasing.resume_node, leasing.resume_node))
            self.note(act.__name__, node)
            await self._ask(lambda act=act, node=node: act(node), wait_s=0.0)

    async def _be_client(self, tenant: str) -> None:
        quota = Quota(cores=6) if tenant == "plain" else Quota()
        principal = Principal(tenant=TenantId(tenant), quota=quota)
        while True:
            await asyncio.sleep(self.chance.expovariate(1 / 4.0))
            request = self._random_request(tenant)
            reply = await self._ask(
                lambda site_request=request: self._request(principal, site_request), request.wait_s
            )
            if reply is not None:
                await self._hold(principal, [grant.lease for grant in reply.grants])

    def _request(self, principal: Principal, request: LeaseRequest) -> Coroutine[Any, Any, Any]:
        assert self.site is not None
        return self.site.leasing.request(principal, request)

    def _random_request(self, tenant: str) -> LeaseRequest:
        chance = self.chance
        is_reserved = tenant == "paying" and chance.random() < 0.5
        return LeaseRequest(
            resources=Resources(
                cores=chance.choice((1, 1, 2, 3)),
                bandwidth=chance.choice((0, 0, 0, 4, 7)),
                licenses=chance.choice(({}, {}, {"matlab": 1}, {"matlab": 2})),
            ),
            lease_class=LeaseClass.RESERVED if is_reserved else LeaseClass.ELASTIC,
            pool=chance.choice(("default", "default", "small")),
            count=chance.choice((1, 1, 2, 4)),
            together=chance.random() < 0.4,
            wait_s=chance.choice((0.0, 2.0, 10.0, 60.0)),
        )

    async def _hold(self, principal: Principal, leases: list[Any]) -> None:
        """Renew for a while, or forget to; then give back, or forget to."""
        renewals = self.chance.choice((0, 1, 3, 8))
        for _ in range(renewals):
            await asyncio.sleep(self.chance.uniform(3.0, 10.0))
            await self._ask(lambda: self._leasing().renew(principal, leases), wait_s=0.0)
            if self.chance.random() < 0.2:
                await self._ask(lambda: self._leasing().add_executor(principal, leases[0]), wait_s=0.0)
        if self.chance.random() < 0.6:
            for lease in leases:
                await self._ask(lambda lease=lease: self._leasing().release(principal, lease), wait_s=0.0)

    def _leasing(self) -> Leasing:
        assert self.site is not None
        return self.site.leasing

    async def _ask(self, ask: Callable[[], Coroutine[Any, Any, Any]], wait_s: float) -> Any:
        """One HTTP request: the client may give up, the site may die meanwhile. None unless it was answered
        well.
        """
        site = self.site
        if site is None:
            return None
        task = site.spawn(ask())
        gives_up_s = self.chance.uniform(0.0, 5.0) if self.chance.random() < 0.1 else None
        wait_s = min(wait_s, SETTINGS.queue_wait_s)
        done, _ = await asyncio.wait([task], timeout=gives_up_s or wait_s + ANSWER_SLACK_S)
        if not done:
            task.cancel()
            await asyncio.wait([task])
            if gives_up_s is None and site is self.site:
                raise HangError(
                    f"a request that may wait {wait_s} s was not answered in {wait_s + ANSWER_SLACK_S} s"
                )
            return self.note("client gave up")
        if task.cancelled() or site.ledger.is_dead:
            return self.note("site died under a request")
        error = task.exception()
        if error is None:
            self.note("answered", type(task.result()).__name__)
            return task.result()
        if not isinstance(error, IsthmusError):
            raise error
        self.note(f"refused {type(error).__name__}", error)
        return None

    # invariants ---------------------------------------------------------------------------------------------
    def _check_invariants(self) -> None:
        for agent in self.agents:
            agent.check_capacity()
        if self.site is None or self.site.ledger.is_dead:
            return
        leasing = self.site.leasing
        assert leasing.requests_waiting <= SETTINGS.queue_max, "the queue has grown over its limit"
        books = leasing._books
        for name, free in zip(books.nodes.ids, books.nodes.free_cores.tolist(), strict=True):
            held = sum(held.lease.resources.cores for held in books.on_node(name))
            assert free >= 0, f"{name} is over-booked"
            assert free + held == 4, f"{name}: {free} cores free and {held} held do not make 4"
            there = [held.lease.resources.amounts.get("bandwidth", 0) for held in books.on_node(name)]
            left = int(books.nodes.free_of["bandwidth"][books.nodes.index[name]])
            assert left >= 0, f"{name}: more bandwidth is booked than there is"
            assert left + sum(there) == BANDWIDTH, f"{name}: {left} bit/s free beside {there}"
        used = books.situation().held("licenses.matlab")
        assert 0 <= used <= SETTINGS.licenses["matlab"], f"{used} licences are held, there are fewer"

    def _check_rest(self) -> None:
        """Everything is quiet: ledger, agents and platform must agree that nothing is leased."""
        assert self.site is not None, "the site did not come back"
        leasing = self.site.leasing
        left = [held.lease for held in leasing._books.open.values()]
        assert not left, f"leases that never ended: {left}"
        running = [twin.lease for agent in self.agents for twin in agent.running.values()]
        assert not running, f"still running on nodes: {running}"
        assert not self.platform._bookings.states(), "allocations that nobody gave back"
        assert not leasing._books.tenants, f"tenants that still hold something: {leasing._books.tenants}"
        rows = self._keeper.execute(
            "SELECT l.lease, sum(t.state = 'ended') FROM leases l JOIN transitions t USING (lease) GROUP BY 1"
        ).fetchall()
        wrong = [row for row in rows if row[1] != 1]
        assert not wrong, f"leases that did not end exactly once: {wrong}"
        self.note("leases in all", len(rows))
        for lease in self.site.ledger.ended_leases(None):
            assert lease.end_reason is not None, f"lease {lease.lease} ended without a reason"
            self.note(f"ended {lease.end_reason}", lease.lease)
