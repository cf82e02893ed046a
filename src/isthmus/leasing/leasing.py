"""Leases: ask for them, renew them, give them back. The one door to them for everything above.

    request -> decision, written down -> allocation -> order to the agent -> written down -> grant

Invariant: every transition is written before it is acted on; every answer that a caller gets is true in the
ledger. Not here: deciding and waiting (`granting.py`), starting (`starting.py`), what time and agents do to
leases (`reconciling.py`).
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from isthmus.core import kinds, tokens
from isthmus.core.api import (
    BillRow,
    ExecutorReply,
    FunctionSummary,
    Grant,
    KillReply,
    LeaseReply,
    LeaseRequest,
    LicenseSummary,
    Renewal,
    RenewReply,
)
from isthmus.core.clock import Clock
from isthmus.core.errors import (
    DeniedError,
    InvalidRequestError,
    LeaseEndedError,
    NotFoundError,
    PermissionDeniedError,
    SiteUnavailableError,
)
from isthmus.core.ids import ExecutorId, LeaseId, NodeId, RequestId, TenantId, new_id
from isthmus.core.model import EndReason, Lease, LeaseClass, LeaseState, Node, Principal
from isthmus.core.settings import LeasingSettings
from isthmus.leasing.acting import Acting
from isthmus.leasing.books import Books, Held
from isthmus.leasing.consenting import Consenting
from isthmus.leasing.control import NodeControl
from isthmus.leasing.explaining import Explanation, explain_lease, explain_request, without_others
from isthmus.leasing.functions import sum_by_name
from isthmus.leasing.granting import Granting
from isthmus.leasing.inventory import Inventory
from isthmus.leasing.ledger import Batch, Ledger
from isthmus.leasing.lifecycle import (
    OPEN,
    DrainOrdered,
    ExecutorAdded,
    ExecutorGone,
)
from isthmus.leasing.reconciling import Reconciling
from isthmus.leasing.starting import Starting
from isthmus.node.messages import AddExecutor, AgentHello, ExecutorEnded, Heartbeat, KillExecutor, LeaseEnded
from isthmus.platforms.platform import Platform
from isthmus.policy import Demand, Logged, PolicySet, Replay, decide, fairness
from isthmus.policy.fairness import Standing
from isthmus.policy.replay import Change, judge, summed
from isthmus.policy.snapshot import Holding

COUNT_MAX = 10_000  # leases in one request
EXECUTORS_MAX = 64  # in one lease, nested calls included
CLOSE_WAIT_S = 5.0  # beyond the grace: for agents to confirm that everything has ended


class Leasing:
    def __init__(
        self,
        settings: LeasingSettings,
        ledger: Ledger,
        platform: Platform,
        nodes: NodeControl,
        policies: PolicySet,
        clock: Clock,
        site_key: bytes,
        new_id: Callable[[str], str] = new_id,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._platform = platform
        self._control = nodes
        self._policies = policies
        self._clock = clock
        self._site_key = site_key
        self._new_id = new_id
        self._books = Books(settings, ledger, clock, policies.fair)
        self._inventory = Inventory(settings.agent_silence_s, ledger.draining_nodes())
        self._acting = Acting(settings, self._books, platform, nodes, clock)
        self._granting = Granting(settings, self._books, self._acting, policies, clock, new_id)
        self._acting.on_freed = self._granting.serve_waiters
        self._starting = Starting(self._acting, platform, nodes, clock, site_key)
        consenting = Consenting(policies, self._books, self._inventory, clock)
        self._reconciling = Reconciling(
            settings, self._books, self._inventory, self._acting, ledger, consenting, clock
        )

    # life of the site ---------------------------------------------------------------------------------------
    async def run(self) -> None:
        """The reconcile loop, until cancelled."""
        await self._reconciling.run(self._platform)

    async def surveyed(self) -> None:
        """Until the platform has been asked for its nodes once."""
        await self._reconciling.surveyed.wait()

    async def close(self) -> None:
        """End every lease (SITE_STOPPED) and turn requests away. Leases of silent nodes stay open."""
        self._granting.close()
        self._acting.withdraw(list(self._books.open.values()), EndReason.SITE_STOPPED, "the site was stopped")
        try:
            async with asyncio.timeout(self._settings.grace_s + CLOSE_WAIT_S):
                await self._acting.all_ended()
                await self._acting.all_freed()
        except TimeoutError:
            pass  # what is still open is settled by the next site, or fenced
        await self._acting.close()
        self._books.flush()

    # asking -------------------------------------------------------------------------------------------------
    async def request(self, principal: Principal, request: LeaseRequest) -> LeaseReply:
        """Active leases, ready to be connected to.

        Raises DeniedError (policy, quota), NoCapacityError (nothing free within wait_s, or the queue is
        full), PermissionDeniedError, InvalidRequestError, SiteUnavailableError, or what the agent's Failed
        answer names.
        """
        demand = self._demand(principal, request)
        self._reconciling.warming.used(request.pool, request.environment)
        decision, granted = await self._granting.grant(demand)
        started, failure = await self._starting.start(granted, request.together)
        if failure is not None and (request.together or not started):
            raise failure
        explanation = (
            decision.reason if failure is None else f"{len(granted) - len(started)} did not start: {failure}"
        )
        grants = tuple(self._grant_of(held) for held in started)
        return LeaseReply(request=demand.request, grants=grants, explanation=explanation)

    def _demand(self, principal: Principal, request: LeaseRequest) -> Demand:
        if self._granting.is_closing:
            raise SiteUnavailableError("the site is stopping")
        if principal.role == "lease":
            raise PermissionDeniedError(
                "code under a lease may add executors to it, but not ask for leases of its own"
            )
        if not 1 <= request.count <= COUNT_MAX:
            raise InvalidRequestError(f"count={request.count}; ask for 1 to {COUNT_MAX} leases at once")
        if request.wait_s < 0:
            raise InvalidRequestError(f"wait_s={request.wait_s} is negative")
        return Demand(
            request=RequestId(self._new_id("rq")),
            tenant=principal.tenant,
            role=principal.role,
            quota=principal.quota,
            lease=request,
        )

    def _grant_of(self, held: Held) -> Grant:
        lease = held.lease
        assert lease.node is not None
        left_s = held.closes_at - self._clock.monotonic()
        return Grant(
            lease=lease.lease,
            node=lease.node,
            executors=lease.executors,
            token=self._token(lease),
            deadline_s=lease.deadline_s,
            lease_s=self._settings.lease_s,
            lease_class=lease.lease_class,
            enforcement=lease.enforcement,
            open_s=max(left_s, 0.001) if left_s < float("inf") else 0.0,
        )

    def _token(self, lease: Lease) -> str:
        assert lease.node is not None
        claims = tokens.Claims(
            lease=lease.lease, tenant=lease.tenant, node=lease.node, expires_s=lease.deadline_s
        )
        return tokens.sign(claims, tokens.lease_key(self._site_key, lease.lease))

    # holding ------------------------------------------------------------------------------------------------
    async def renew(self, principal: Principal, ids: Iterable[LeaseId]) -> RenewReply:
        """Give each lease a full life from now. Agents are told in the background, when they can be."""
        return RenewReply(renewals=tuple(self._renew(principal, lease) for lease in ids))

    def _renew(self, principal: Principal, lease_id: LeaseId) -> Renewal:
        held = self._books.open.get(lease_id)
        if held is None or held.lease.end_reason is not None or held.lease.state not in OPEN:
            return self._no_renewal(principal, lease_id)
        if not _sees(principal, held.lease):
            raise NotFoundError(f"no lease {lease_id}")
        self._acting.prolong(held)
        return Renewal(
            lease=lease_id,
            ok=True,
            deadline_s=held.lease.deadline_s,
            token=self._token(held.lease),
            draining=held.lease.state is LeaseState.DRAINING,
        )

    def _no_renewal(self, principal: Principal, lease_id: LeaseId) -> Renewal:
        lease = self.lease(principal, lease_id)
        reason = lease.end_reason.value if lease.end_reason else ""
        return Renewal(lease=lease_id, ok=False, reason=reason, detail=lease.end_detail)

    async def release(self, principal: Principal, lease_id: LeaseId) -> None:
        """End the lease. Returns when that is confirmed, or after the grace: then it is confirmed later."""
        held = self._books.open.get(lease_id)
        if held is None or not _sees(principal, held.lease):
            self.lease(principal, lease_id)  # raises NotFoundError, or it has ended already
            return
        self._acting.withdraw([held], EndReason.RELEASED, "")
        try:
            async with asyncio.timeout(self._settings.grace_s + 1.0):
                await self._acting.ended(lease_id)
        except TimeoutError:
            return

    async def add_executor(self, principal: Principal, lease_id: LeaseId) -> ExecutorReply:
        """One more executor in a lease. Raises LeaseEndedError, DeniedError (too many), agent's errors."""
        held = self._running(principal, lease_id)
        assert held.lease.orders_to is not None
        if len(held.lease.executors) >= EXECUTORS_MAX:
            raise DeniedError(
                f"lease {lease_id} has {EXECUTORS_MAX} executors already, the most one lease may have"
            )
        done = await self._control.order(held.lease.orders_to, AddExecutor(number=0, lease=lease_id))
        assert done.executor is not None
        if held.lease.state is not LeaseState.ACTIVE:
            raise LeaseEndedError(f"lease {lease_id} ended meanwhile ({held.lease.end_reason})")
        self._books.note(held, ExecutorAdded(at_s=self._clock.now(), executor=done.executor))
        return ExecutorReply(executor=done.executor, token=self._token(held.lease))

    async def kill_executor(self, principal: Principal, lease_id: LeaseId, executor: ExecutorId) -> KillReply:
        """SIGKILL one executor. The lease ends with its last one."""
        held = self._running(principal, lease_id)
        assert held.lease.orders_to is not None
        order = KillExecutor(number=0, lease=lease_id, executor=executor)
        done = await self._control.order(held.lease.orders_to, order)
        if done.killed and len(held.lease.executors) > 1 and held.lease.state in OPEN:
            self._books.note(held, ExecutorGone(at_s=self._clock.now(), executor=executor))
        return KillReply(executor=executor, killed=done.killed)

    def _running(self, principal: Principal, lease_id: LeaseId) -> Held:
        held = self._books.open.get(lease_id)
        if held is None or not _sees(principal, held.lease):
            lease = self.lease(principal, lease_id)
            raise LeaseEndedError(
                f"lease {lease_id} has ended ({lease.end_reason}) {lease.end_detail}".rstrip()
            )
        if held.lease.state not in (LeaseState.ACTIVE, LeaseState.DRAINING):
            raise LeaseEndedError(f"lease {lease_id} is {held.lease.state}")
        return held

    # looking ------------------------------------------------------------------------------------------------
    @property
    def requests_waiting(self) -> int:
        return self._granting.requests_waiting

    @property
    def policies(self) -> PolicySet:
        return self._policies

    def leases(self, principal: Principal, ended: bool) -> list[Lease]:
        """Those that the principal may see, oldest first; with `ended` also the past, newest first."""
        running = [held.lease for held in self._books.open.values() if _sees(principal, held.lease)]
        past = self._ledger.ended_leases(_scope(principal)) if ended else []
        return running + [lease for lease in past if _sees(principal, lease)]

    def lease(self, principal: Principal, lease_id: LeaseId) -> Lease:
        """Raises NotFoundError also for other tenants' leases: their existence is nobody's business."""
        lease = self._find(lease_id)
        if lease is None or not _sees(principal, lease):
            raise NotFoundError(f"no lease {lease_id}; `isthmus leases --ended` lists yours")
        return lease

    def _find(self, lease_id: LeaseId) -> Lease | None:
        held = self._books.open.get(lease_id)
        return held.lease if held is not None else self._ledger.lease(lease_id)

    def nodes(self) -> list[Node]:
        return self._inventory.nodes(self._clock.monotonic())

    def licenses(self) -> list[LicenseSummary]:
        """What there is of them in all, by name."""
        situation = self._books.situation()
        rows = []
        for kind, stock in sorted(situation.stocks.items()):
            held = situation.held(kind)
            free = max(stock.total - held - stock.others, 0)
            rows.append(
                LicenseSummary(
                    name=kinds.license_of(kind), total=stock.total, held=held, others=stock.others, free=free
                )
            )
        return rows

    def explain(self, principal: Principal, subject: str) -> Explanation:
        """Why a request (`rq_...`) or a lease (`ls_...`) came out as it did. Raises NotFoundError."""
        if subject.startswith("rq_"):
            decisions = self._decisions(principal, RequestId(subject))
            if not decisions or not _sees_tenant(principal, decisions[0].demand.tenant):
                raise NotFoundError(f"no request {subject}; refusals name theirs")
            return explain_request(decisions)
        lease = self.lease(principal, LeaseId(subject))
        request = self._ledger.request_of(lease.lease)
        decisions = self._decisions(principal, request) if request else []
        if not decisions:
            raise NotFoundError(f"the decision on lease {subject} is older than leasing.history_s")
        return explain_lease(lease, decisions, self._ledger.transitions(lease.lease))

    def _decisions(self, principal: Principal, request: RequestId) -> list[Logged]:
        """What was decided on a request, as the principal may see it."""
        decisions = list(self._ledger.decisions(request))
        if principal.role in ("admin", "operator"):
            return decisions
        return [without_others(logged, self._find) for logged in decisions]

    def dry_run(
        self,
        principal: Principal,
        request: LeaseRequest,
        policies: PolicySet | None = None,
        at_s: float | None = None,
    ) -> Explanation:
        """What this request would get now, under these policies (the site's own if None). Changes nothing.

        at_s   by the clock at this time, in seconds since the epoch; None: now
        """
        policies = self._policies if policies is None else policies
        demand = self._demand(principal, request)
        snapshot = self._books.snapshot(policies, demand)
        if at_s is not None:
            snapshot = msgspec.structs.replace(snapshot, clock_s=at_s)
        logged = Logged(
            demand=demand, snapshot=snapshot.record(), decision=decide(policies, snapshot, demand)
        )
        return explain_request([logged])

    async def replay(self, policies: PolicySet, against: PolicySet | None = None) -> Replay:
        """The decision log judged again under other policies: what comes out otherwise than under `against`,
        or than it did. The site goes on meanwhile.
        """
        judged: list[Change | None] = []
        for entry in self._ledger.decisions():
            judged.append(judge(entry, policies, against))
            await asyncio.sleep(0)
        return summed(judged)

    def standings(
        self, principal: Principal, known: Collection[TenantId] = ()
    ) -> tuple[tuple[Standing, Holding], ...]:
        """Where tenants stand by fair share and what they hold, the next to be served first; `known` ones
        also without having held anything.
        """
        situation = self._books.situation()
        tenants = {*situation.tenants, *situation.used, *self._policies.terms, *known}
        seen = sorted(tenant for tenant in tenants if _sees_tenant(principal, tenant))
        ranked = fairness.standings(self._policies, situation, seen)
        return tuple((one, situation.tenants.get(one.tenant, Holding())) for one in ranked)

    def hear(self, signals: Mapping[str, float]) -> None:
        """What the site's source of signals says now."""
        self._books.signals = dict(signals)

    @property
    def signals(self) -> Mapping[str, float]:
        return self._books.signals

    def bill(self, principal: Principal) -> list[BillRow]:
        self._books.flush()
        rows = self._ledger.bill(_scope(principal))
        return [msgspec.structs.replace(row, currency=self._books.currency) for row in rows]

    def functions(self, principal: Principal) -> list[FunctionSummary]:
        """Functions seen in the leases that the principal may see, past and present."""
        running = [held for held in self._books.open.values() if _sees(principal, held.lease)]
        live = [row for held in running for row in held.functions.summaries()]
        return sorted(
            sum_by_name([*self._ledger.functions(_scope(principal)), *live]).values(), key=lambda r: r.name
        )

    # nodes --------------------------------------------------------------------------------------------------
    async def agent_joined(self, node: NodeId, hello: AgentHello) -> None:
        await self._reconciling.joined(self._platform, node, hello)

    async def agent_left(self, node: NodeId) -> None:
        """Unknown is not gone: its leases stay as they are, the node only gets no new ones."""
        self._inventory.left(node)
        self._books.nodes.set_open(node, False)

    async def agent_report(self, node: NodeId, message: Heartbeat | ExecutorEnded | LeaseEnded) -> None:
        self._reconciling.report(node, message)

    async def drain_node(self, node: NodeId) -> None:
        """No new leases; elastic ones are taken back after their grace, reserved ones stay until their owner
        ends them. Survives a restart."""
        self._known(node)
        self._ledger.write(Batch(drained=(node,)))
        self._inventory.draining.add(node)
        self._books.nodes.set_open(node, False)
        active = [held for held in self._books.on_node(node) if held.lease.state is LeaseState.ACTIVE]
        elastic = [held for held in active if held.lease.lease_class is not LeaseClass.RESERVED]
        self._acting.apply([(held, DrainOrdered(at_s=self._clock.now())) for held in elastic])

    async def resume_node(self, node: NodeId) -> None:
        self._known(node)
        self._ledger.write(Batch(resumed=(node,)))
        self._inventory.draining.discard(node)
        self._books.nodes.set_open(node, self._inventory.is_open(node, self._clock.monotonic()))
        self._granting.serve_waiters()

    def _known(self, node: NodeId) -> None:
        if not self._inventory.knows(node):
            raise NotFoundError(f"no node {node!r}; `isthmus nodes` lists them")


def _sees(principal: Principal, lease: Lease) -> bool:
    if principal.role == "lease":
        return lease.lease == principal.lease
    return _sees_tenant(principal, lease.tenant)


def _sees_tenant(principal: Principal, tenant: TenantId) -> bool:
    return principal.role in ("admin", "operator") or tenant == principal.tenant


def _scope(principal: Principal) -> TenantId | None:
    return None if principal.role in ("admin", "operator") else principal.tenant
