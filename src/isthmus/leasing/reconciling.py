"""The reconcile loop: compare what should be with what is, and have the difference acted on.

Each tick looks at every open lease once and asks what is due for it; all that is due is written in one
transaction. Everything here may be repeated, skipped or interrupted without harm: the next tick sees the same
states again.
"""

import asyncio

import structlog

from isthmus.core.clock import Clock
from isthmus.core.errors import IsthmusError, NoCapacityError, NotFoundError, SiteUnavailableError
from isthmus.core.ids import LeaseId, NodeId
from isthmus.core.model import EndReason, ExecutorEnd, LeaseState, Node
from isthmus.core.settings import LeasingSettings
from isthmus.leasing.acting import Acting
from isthmus.leasing.books import Books, Held
from isthmus.leasing.consenting import Consenting
from isthmus.leasing.inventory import Inventory
from isthmus.leasing.ledger import Ledger
from isthmus.leasing.lifecycle import (
    Adopted,
    DrainOrdered,
    EndOrdered,
    Event,
    ExecutorGone,
    Gone,
    Measured,
    Renewed,
)
from isthmus.leasing.warming import Warming
from isthmus.node.messages import AgentHello, EndLease, ExecutorEnded, Heartbeat, LeaseEnded, RunningLease
from isthmus.node.owners import Lent
from isthmus.node.slack import Slack
from isthmus.platforms.platform import AllocationState, Platform

FLUSH_S = 10.0  # measured usage that a crash of the site may lose
PRUNE_S = 3600.0
STRAYS_MAX = 10_000
_TIME_IS_UP = "the time limit of its allocation is near"
_IDLE_TAKEN_BACK = "taken back while nothing ran in it"

_log = structlog.get_logger("leasing")


class Reconciling:
    def __init__(
        self,
        settings: LeasingSettings,
        books: Books,
        inventory: Inventory,
        acting: Acting,
        ledger: Ledger,
        consenting: Consenting,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._books = books
        self._inventory = inventory
        self._acting = acting
        self._ledger = ledger
        self._consenting = consenting
        self._clock = clock
        self._warming = Warming(settings.pools)
        self._strays: dict[tuple[NodeId, LeaseId], None] = {}
        self._missing: dict[LeaseId, None] = {}
        self._flushed_at = self._pruned_at = clock.monotonic()
        self._surveyed_at = float("-inf")
        self._surveying: asyncio.Task[None] | None = None
        self.surveyed = asyncio.Event()  # the platform has been asked once, whatever it said
        self._adopt_open_leases()

    @property
    def warming(self) -> Warming:
        return self._warming

    def _adopt_open_leases(self) -> None:
        """After a restart leases get a full life: their holders could not renew meanwhile."""
        for held in self._books.open.values():
            self._acting.extend_fence(held)
            held.expires_at = self._clock.monotonic() + self._settings.lease_s
            held.seen_at = self._clock.monotonic()
            if held.lease.state is LeaseState.DRAINING and held.lease.end_reason is None:
                held.evicted_at = self._clock.monotonic() + self._settings.grace_s

    # the loop -----------------------------------------------------------------------------------------------
    async def run(self, platform: Platform) -> None:
        """Until cancelled. A tick that fails (a full disk, a platform that does not answer) is repeated."""
        async with asyncio.TaskGroup() as beside:
            while True:
                try:
                    self._survey_beside(platform, beside)
                    self.tick()
                except IsthmusError as error:
                    _log.error("reconcile tick failed; the next one repeats it", why=str(error))
                await self._clock.sleep(self._settings.tick_s)

    def _survey_beside(self, platform: Platform, tasks: asyncio.TaskGroup) -> None:
        """One at a time: a platform that answers slowly holds up nothing but the next survey."""
        is_due = self._clock.monotonic() - self._surveyed_at >= platform.survey_s
        if is_due and (self._surveying is None or self._surveying.done()):
            self._surveying = tasks.create_task(self._survey_safely(platform), name="leasing.survey")

    async def _survey_safely(self, platform: Platform) -> None:
        try:
            await self.survey(platform)
        except IsthmusError as error:
            _log.error("a survey of the platform failed; the next one repeats it", why=str(error))
        self.surveyed.set()

    def tick(self) -> None:
        now = self._clock.monotonic()
        self._refresh_open(now)
        due = [(held, self._due(held, now)) for held in list(self._books.open.values())]
        self._acting.apply([(held, event) for held, event in due if event is not None])
        self._repeat_orders(now)
        self._keep_starting(now)
        for node, warm in self._warming.due(self._inventory.audible(now)):
            self._acting.order("warm", node, warm, warm.environment.id)
        self._keep_books(now)
        self._forget_lent(now)
        self._acting.on_freed()

    async def survey(self, platform: Platform) -> None:
        """Ask the platform what there is. When it cannot tell, everything stays as it was."""
        self._surveyed_at = self._clock.monotonic()
        try:
            nodes = await platform.nodes()
            allocations = await platform.allocations()
        except SiteUnavailableError as error:
            _log.warning("the platform does not answer", why=str(error))
            return
        if self._inventory.set_nodes(nodes):
            self._books.set_nodes(self._inventory.rows(self._clock.monotonic()))
        await self._take_stock(platform)
        if allocations is None:
            return
        ours = {
            held.lease.allocation: held
            for held in self._books.open.values()
            if held.lease.allocation is not None
        }
        for allocation in allocations:
            if allocation not in ours:
                self._acting.release(allocation)
        ended: dict[NodeId | None, list[Held]] = {}
        for name, held in ours.items():
            state = allocations.get(name)
            if held.lease.agent is not None:
                await self._compare(platform, held, state)
            elif state is None:
                await self._take_again(platform, held)
            elif state == "ended":
                ended.setdefault(held.lease.node, []).append(held)
            elif state == "suspended":
                self._acting.extend_fence(held)  # its agent is silent, and what it runs may yet go on
            elif state == "leaving" and held.lease.state is LeaseState.ACTIVE:
                await self._hand_back(platform, held)
        for together in ended.values():  # what ended with one node has one cause: it is asked for once
            await asyncio.gather(*(self._settle(platform, held) for held in together))

    async def _settle(self, platform: Platform, held: Held) -> None:
        """Its allocation has ended: so does the lease, by order where the platform is not sure."""
        is_buried = await self._is_buried(platform, held)
        if not is_buried and not held.is_starting and held.lease.state is LeaseState.ACTIVE:
            self._acting.end(held, EndReason.NODE_LOST, f"{platform.name} ended its allocation")

    async def _take_stock(self, platform: Platform) -> None:
        try:
            self._books.stocks = await platform.stocks()
        except SiteUnavailableError as error:
            _log.warning("the platform's licences cannot be read; they stay as they were", why=str(error))

    async def _compare(self, platform: Platform, held: Held, state: AllocationState | None) -> None:
        """An allocation that brings its own agent ends that agent, and the lease, with itself."""
        assert held.lease.allocation is not None
        assert held.lease.node is not None
        if held.is_starting or held.is_over or (state == "running" and held.closes_at < float("inf")):
            return
        fate = await platform.fate(held.lease.allocation, held.lease.node)
        if fate is not None and fate.state != "ended":
            self._acting.know_end(held, fate)
        elif not held.is_over and not held.is_starting:
            reason = fate.end_reason if fate is not None else EndReason.NODE_LOST
            detail = fate.detail if fate is not None else f"{platform.name} does not know its allocation"
            self._acting.apply([(held, self._gone(reason, detail))])

    async def _take_again(self, platform: Platform, held: Held) -> None:
        """A platform that keeps allocations in memory lost them with the site; the lease may still run."""
        lease = held.lease
        if lease.node is None or lease.allocation is None or held.is_starting or held.is_over:
            return
        try:
            taken = await platform.acquire(lease.allocation, lease.node, lease.resources, lease.lease_class)
        except NoCapacityError as error:
            _log.error("a running lease has no allocation any more", lease=lease.lease, why=str(error))
            await self._is_buried(platform, held)
            return
        self._acting.know_end(held, taken)
        if lease.lease not in self._books.open:  # it ended meanwhile
            self._acting.release(lease.allocation)

    async def _is_buried(self, platform: Platform, held: Held) -> bool:
        """Whether it is over: if the platform is sure that the allocation has ended, nothing in it runs."""
        assert held.lease.allocation is not None
        assert held.lease.node is not None
        if held.is_over or held.is_starting:
            return held.is_over
        fate = await platform.fate(held.lease.allocation, held.lease.node)
        if fate is not None and fate.state == "ended" and not held.is_over and not held.is_starting:
            self._acting.apply([(held, self._gone(fate.end_reason, fate.detail))])
        return held.is_over

    async def _hand_back(self, platform: Platform, held: Held) -> None:
        """The platform wants the allocation back: the lease may finish what runs, within its grace."""
        assert held.lease.allocation is not None
        assert held.lease.node is not None
        fate = await platform.fate(held.lease.allocation, held.lease.node)
        if held.lease.state is LeaseState.ACTIVE:
            detail = fate.detail if fate is not None else ""
            self._acting.apply([(held, DrainOrdered(at_s=self._clock.now(), detail=detail))])

    def _refresh_open(self, now: float) -> None:
        for node in self._books.nodes.ids:
            self._books.nodes.set_open(node, self._inventory.is_open(node, now))

    def _due(self, held: Held, now: float) -> Event | None:
        """What has become of this lease by the passing of time."""
        lease = held.lease
        if lease.node is None or lease.state is LeaseState.GRANTED:
            return self._gone(EndReason.FAILED, "the site stopped before its start")
        is_audible = self._inventory.is_audible(lease.agent or lease.node, now)
        if not is_audible and now > held.fenced_at and not held.is_starting:
            detail = f"the agent of node {lease.node} is silent; the lease cannot have outlived its deadline"
            return self._gone(EndReason.NODE_LOST, detail)
        if lease.end_reason is not None or held.is_starting:
            return None
        match lease.state:
            case LeaseState.STARTING:
                return self._end(EndReason.FAILED, "nobody waits for its start any more")
            case _ if now > held.expires_at:
                return self._end(EndReason.EXPIRED, f"not renewed for {self._settings.lease_s:g} s")
            case LeaseState.ACTIVE if now > held.closes_at:
                return DrainOrdered(at_s=self._clock.now())
            case LeaseState.DRAINING if now > held.evicted_at and now > held.closes_at:
                return self._end(EndReason.EVICTED, _TIME_IS_UP)
            case LeaseState.DRAINING if now > held.evicted_at:
                return self._end(EndReason.EVICTED, f"its grace of {self._settings.grace_s:g} s is over")
            case _ if is_audible and self._is_missing(held, now):
                return self._end(EndReason.NODE_LOST, f"the agent of node {lease.node} does not run it")
        return None

    def _is_missing(self, held: Held, now: float) -> bool:
        """Its agent came back without it, or reports others but not this one."""
        return held.lease.lease in self._missing or now - held.seen_at > 2 * self._settings.agent_silence_s

    def _end(self, reason: EndReason, detail: str) -> EndOrdered:
        return EndOrdered(at_s=self._clock.now(), reason=reason, detail=detail)

    def _gone(self, reason: EndReason, detail: str) -> Gone:
        return Gone(at_s=self._clock.now(), reason=reason, detail=detail)

    def _repeat_orders(self, now: float) -> None:
        for held in self._books.open.values():
            lease = held.lease
            agent = lease.orders_to
            if lease.end_reason is None or agent is None:
                continue
            if lease.agent is not None or self._inventory.is_audible(agent, now):
                self._acting.repeat_end(held)
        for node, lease_id in list(self._strays):
            if self._inventory.is_audible(node, now):
                del self._strays[node, lease_id]
                self._end_stray(node, lease_id)

    def _keep_starting(self, now: float) -> None:
        """A start may take longer than a lease lives (an environment is being built): nobody can renew it
        yet.
        """
        for held in self._books.open.values():
            is_starting = held.is_starting and held.lease.state is LeaseState.STARTING
            if is_starting and held.expires_at - now < 0.5 * self._settings.lease_s:
                self._acting.prolong(held)

    def _end_stray(self, node: NodeId, lease_id: LeaseId) -> None:
        """A node runs what the ledger says is over, or never heard of."""
        if lease_id in self._books.open:
            return
        known = self._ledger.lease(lease_id)
        reason = (known.end_reason if known else None) or EndReason.FAILED
        self._acting.order("stray", node, EndLease(number=0, lease=lease_id, reason=reason), lease_id)

    def _keep_books(self, now: float) -> None:
        if now - self._flushed_at >= FLUSH_S:
            self._flushed_at = now
            self._books.flush()
        if now - self._pruned_at >= PRUNE_S:
            self._pruned_at = now
            self._ledger.prune(self._clock.now() - self._settings.history_s)

    # reports ------------------------------------------------------------------------------------------------
    async def joined(self, platform: Platform, node: NodeId, hello: AgentHello) -> None:
        """An agent is here: adopt what it runs, settle the rest. Raises NotFoundError for a foreign node."""
        if hello.lent is not None:
            self._lend(node, hello.lent)
        if not self._expects(node):
            await self.survey(platform)
        if not self._expects(node):
            raise NotFoundError(f"platform {platform.name} has no node or allocation {node!r}")
        now = self._clock.monotonic()
        self._inventory.joined(node, hello.enforcement, now)
        self._warming.forget(node)
        running = {lease.lease: lease for lease in hello.running}
        for held in self._books.of_agent(node):
            found = running.pop(held.lease.lease, None)
            if found is not None:
                self._adopt(held, found, now)
            elif not held.is_starting:
                self._missing[held.lease.lease] = (
                    None  # settled by the next tick: its LeaseEnded may be on its way
                )
        for lease_id in running:
            self._note_stray(node, lease_id)
        self._refresh_open(now)
        self._acting.on_freed()

    def _lend(self, node: NodeId, lent: Lent) -> None:
        if self._inventory.lent(node) is not None:
            return
        if not self._inventory.lend(node, lent):
            raise NotFoundError(f"{node!r} is a node of its own, and not for job {lent.job} to lend")
        self._books.set_nodes(self._inventory.rows(self._clock.monotonic()))

    def _forget_lent(self, now: float) -> None:
        """Jobs that lent have ended, and with them what was harvested."""
        has_forgotten = False
        for node in self._inventory.abandoned(now):
            gone = self._gone(EndReason.EVICTED, f"the job that lent {node} has ended")
            self._acting.apply([(held, gone) for held in self._books.on_node(node) if not held.is_starting])
            if not self._books.on_node(node):
                has_forgotten |= self._inventory.forget_lent(node)
        if has_forgotten:
            self._books.set_nodes(self._inventory.rows(now))

    def _expects(self, agent: NodeId) -> bool:
        return self._inventory.knows(agent) or bool(self._books.of_agent(agent))

    def _adopt(self, held: Held, found: RunningLease, now: float) -> None:
        self._missing.pop(held.lease.lease, None)
        held.seen_at = now
        event = Adopted(at_s=self._clock.now(), executors=found.executors, usage=found.usage)
        self._books.note(held, event)
        if held.lease.end_reason is None and held.lease.state is not LeaseState.STARTING:
            left_s = max(held.expires_at - now, 0.0)
            self._books.note(held, Renewed(at_s=event.at_s, deadline_s=event.at_s + left_s))
            self._acting.renew(held)

    def report(self, node: NodeId, message: Heartbeat | ExecutorEnded | LeaseEnded) -> None:
        """Raises LedgerError; the agent repeats what was not taken in."""
        self._inventory.heard(node, self._clock.monotonic())
        match message:
            case Heartbeat():
                self._measure(node, message)
            case ExecutorEnded():
                self._executor_ended(node, message)
            case LeaseEnded():
                self._lease_ended(node, message)

    def _measure(self, node: NodeId, heartbeat: Heartbeat) -> None:
        lent = self._inventory.lent(node)
        if heartbeat.slack is not None and lent is not None:
            self._take_slack(lent, heartbeat.slack)
        now = self._clock.monotonic()
        over: list[tuple[Held, Event]] = []
        for report in heartbeat.leases:
            held = self._books.open.get(report.lease)
            if held is None or held.lease.orders_to != node:
                self._note_stray(node, report.lease)
                continue
            held.seen_at = now
            self._missing.pop(report.lease, None)
            held.functions.report(report.functions)
            self._books.note(held, Measured(at_s=self._clock.now(), usage=report.usage))
            self._books.note_idle(held, report.idle_s)
            if (event := self._idle(held, report.draining)) is not None:
                over.append((held, event))
        if over:
            self._acting.apply(over)

    def _take_slack(self, lent: Node, slack: Slack) -> None:
        """What a job does not use now, as far as policy lets it be harvested."""
        harvested = self._consenting.harvested(besides=lent)
        more = self._inventory.set_slack(lent.node, self._consenting.allowed(lent, slack, harvested))
        self._books.nodes.free(lent.node, *more)
        leaving = self._consenting.to_leave(lent, harvested)
        if leaving:
            self._acting.apply([(held, DrainOrdered(at_s=self._clock.now())) for held in leaving])
        if max(more) > 0:
            self._acting.on_freed()

    def _idle(self, held: Held, is_draining: bool) -> Event | None:
        """What follows from nothing running in it: once its node admits no further call, it may go."""
        pool = self._settings.pools.get(held.lease.pool)
        match held.lease.state:
            case LeaseState.ACTIVE if pool is not None and held.idle_s >= pool.idle_s:
                return self._end(EndReason.IDLE, f"no call for {held.idle_s:.0f} s")
            case LeaseState.DRAINING if is_draining and held.lease.end_reason is None and held.idle_s > 0:
                is_late = self._clock.monotonic() > held.closes_at
                return self._end(EndReason.EVICTED, _TIME_IS_UP if is_late else _IDLE_TAKEN_BACK)
        return None

    def _executor_ended(self, node: NodeId, message: ExecutorEnded) -> None:
        held = self._books.open.get(message.lease)
        if held is None or held.lease.orders_to != node:
            return
        end = ExecutorEnd(executor=message.executor, reason=message.reason, detail=message.detail)
        self._books.note(held, ExecutorGone(at_s=self._clock.now(), executor=message.executor, end=end))
        if not held.lease.executors and held.lease.end_reason is None:
            self._acting.end(held, message.reason, message.detail)

    def _lease_ended(self, node: NodeId, message: LeaseEnded) -> None:
        held = self._books.open.get(message.lease)
        self._strays.pop((node, message.lease), None)
        if held is None:
            self._amend(node, message)
        elif held.lease.orders_to == node:
            self._missing.pop(message.lease, None)
            if message.functions:
                held.functions.report(message.functions)
            at_s = self._clock.now()
            gone = Gone(at_s=at_s, reason=message.reason, detail=message.detail)
            if held.lease.allocation is not None and message.reason is EndReason.EVICTED:
                self._books.note(held, Measured(at_s=at_s, usage=message.usage))
                self._acting.bury(held, gone)
            else:
                self._acting.apply([(held, Measured(at_s=at_s, usage=message.usage)), (held, gone)])

    def _amend(self, node: NodeId, message: LeaseEnded) -> None:
        """The final usage of a lease came after its end was confirmed; only its own agent knows it."""
        known = self._ledger.lease(message.lease)
        if known is None or known.orders_to != node:
            return
        if known.usage != message.usage and known.state is LeaseState.ENDED:
            self._books.amend(known, message.usage)

    def _note_stray(self, node: NodeId, lease_id: LeaseId) -> None:
        if len(self._strays) < STRAYS_MAX:
            self._strays[node, lease_id] = None
