"""What is leased now, in memory: open leases, free resources, who holds what. The ledger's image, never ahead
of it.

Invariant: `apply` computes every new state first, writes them in one transaction, and only then changes
memory: if the ledger refuses, nothing happened. All resources of a lease are booked from `granted` until
`ended`. Not here: acting on effects (`leasing.py`).
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from isthmus.core import kinds
from isthmus.core.api import FunctionSummary
from isthmus.core.clock import Clock
from isthmus.core.ids import LeaseId, NodeId, RequestId, TenantId
from isthmus.core.kinds import Stock
from isthmus.core.model import EndReason, Lease, LeaseClass, LeaseState, Usage
from isthmus.core.settings import LeasingSettings, PoolSettings
from isthmus.leasing.accounts import Accounts
from isthmus.leasing.functions import FunctionCounts
from isthmus.leasing.ledger import Batch, Ledger, Transition
from isthmus.leasing.lifecycle import Effect, Event, Gone, step
from isthmus.leasing.pricing import Pricing
from isthmus.policy.replay import Logged
from isthmus.policy.rules import PolicySet
from isthmus.policy.snapshot import Demand, Holding, NodeRow, NodeTable, Pool, Preemptible, Snapshot
from isthmus.policy.terms import Fair


class Held:
    """An open lease with what the site knows about it besides. Times are `clock.monotonic()` seconds.

    expires_at      without renewal until then, it ends
    fenced_at       if its agent stays silent until then, nothing of it can run any more
    evicted_at      when a draining lease's grace is over
    closes_at       when its allocation's time is nearly over
    seen_at         when its agent last confirmed that it runs
    idle_s          how long no call had run in it then
    is_starting     a requester is waiting for its start
    """

    def __init__(self, lease: Lease, request: RequestId) -> None:
        self.lease = lease
        self.request = request
        self.expires_at = float("inf")
        self.fenced_at = float("inf")
        self.evicted_at = float("inf")
        self.closes_at = float("inf")
        self.seen_at = 0.0
        self.idle_s = 0.0
        self.is_starting = False
        self.is_dirty = False
        self.functions = FunctionCounts()

    @property
    def is_over(self) -> bool:
        return self.lease.state is LeaseState.ENDED


class Change(msgspec.Struct, frozen=True):
    """An event that happened to a lease, and what is to be done about it."""

    held: Held
    event: Event
    effects: tuple[Effect, ...]


class Books:
    def __init__(self, settings: LeasingSettings, ledger: Ledger, clock: Clock, fair: Fair = Fair()) -> None:
        self._pools = settings.pools
        self._idle_s = settings.idle_s
        self._quiet: dict[LeaseId, Held] = {}
        self._ledger = ledger
        self._clock = clock
        self.open: dict[LeaseId, Held] = {}
        self.nodes = NodeTable()
        self.tenants: dict[TenantId, Holding] = {}
        self.pools: dict[str, Pool] = {name: _pool(pool) for name, pool in settings.pools.items()}
        self._accounts = Accounts(fair.half_life_s, ledger.hours())
        self._pricing = Pricing(settings.prices)
        self.signals: Mapping[str, float] = {}  # replaced as a whole when there is news
        self.stocks: Mapping[str, Stock] = {}  # and so are these
        for request, lease in ledger.open_leases():
            self._enter(Held(lease, request))

    @property
    def currency(self) -> str:
        """Of prices."""
        return self._pricing.currency

    def apply(
        self,
        events: Iterable[tuple[Held, Event]],
        new: Sequence[Held] = (),
        decisions: tuple[Logged, ...] = (),
    ) -> list[Change]:
        """Take steps, write them, remember them; `new` leases are entered first. Raises LedgerError."""
        after: dict[LeaseId, Lease] = {held.lease.lease: held.lease for held in new}
        rows = [self._row(held, held.lease, "Requested") for held in new]
        changes: list[Change] = []
        functions: list[tuple[TenantId, FunctionSummary]] = []
        for held, event in events:
            lease = after.get(held.lease.lease, held.lease)
            stepped, effects = self._step(lease, event)
            changes.append(Change(held, event, effects))
            if stepped is not lease:
                after[lease.lease] = stepped
                rows.append(self._row(held, stepped, type(event).__name__, getattr(event, "detail", "")))
            if isinstance(event, Gone):
                functions += [(lease.tenant, row) for row in held.functions.summaries()]
        if rows or decisions:
            self._ledger.write(
                Batch(transitions=tuple(rows), decisions=decisions, functions=tuple(functions))
            )
        for held in new:
            self.open[held.lease.lease] = held
        touched = {id(change.held): change.held for change in changes}
        for held in touched.values():
            self._move(held, after.get(held.lease.lease, held.lease))
        return changes

    def note(self, held: Held, event: Event) -> None:
        """A step that need not survive a crash (usage, renewals): in memory now, in the ledger with
        `flush`.
        """
        before = held.lease
        held.lease, _ = self._step(before, event)
        held.is_dirty = True
        self._accounts.bill(before, held.lease, self._clock.now())

    def amend(self, lease: Lease, usage: Usage) -> None:
        """The final usage of a lease that has ended already. Raises LedgerError."""
        amended = self._priced(lease, msgspec.structs.replace(lease, usage=usage))
        self._ledger.amend(amended)
        self._accounts.bill(lease, amended, self._clock.now())

    def flush(self) -> None:
        """Write down usage measured since the last flush. Raises LedgerError."""
        dirty = [held for held in self.open.values() if held.is_dirty]
        hours = self._accounts.unwritten()
        if dirty or hours:
            updates = tuple((held.request, held.lease) for held in dirty)
            self._ledger.write(Batch(updates=updates, hours=hours))
        self._accounts.written()
        for held in dirty:
            held.is_dirty = False

    def set_nodes(self, rows: Sequence[NodeRow]) -> None:
        """The platform's nodes changed: a new table, with everything that is booked."""
        self.nodes = NodeTable(rows)
        for held in self.open.values():
            if held.lease.node is not None:
                self.nodes.take(held.lease.node, held.lease.resources)

    def on_node(self, node: NodeId) -> list[Held]:
        return [held for held in self.open.values() if held.lease.node == node]

    def of_agent(self, agent: NodeId) -> list[Held]:
        return [held for held in self.open.values() if held.lease.orders_to == agent]

    def situation(self) -> Snapshot:
        """Who holds and used what now."""
        return Snapshot(
            nodes=self.nodes,
            tenants=self.tenants,
            pools=self.pools,
            clock_s=self._clock.now(),
            used=self._accounts.lately,
            signals=self.signals,
            stocks=self.stocks,
        )

    def snapshot(self, policies: PolicySet, demand: Demand, waiting: tuple[TenantId, ...] = ()) -> Snapshot:
        """What the decision on a demand may know now; of elastic leases those without work are listed,
        and the others only where rules or guarantees may push some out.
        """
        situation = self.situation()
        quota = demand.quota
        windows_h = policies.windows_h | ({quota.window_h} if quota.core_hours else set())
        spent = {
            window_h: self._accounts.spent_core_h(demand.tenant, window_h, situation.clock_s)
            for window_h in sorted(windows_h)
        }
        return msgspec.structs.replace(
            situation,
            waiting=waiting,
            spent_core_h=spent,
            preemptible=self._preemptible(self.open if policies.may_preempt else self._quiet),
        )

    def note_idle(self, held: Held, idle_s: float) -> None:
        """What the agent says about calls in this lease."""
        held.idle_s = idle_s
        if idle_s >= self._idle_s and held.lease.lease in self.open:
            self._quiet[held.lease.lease] = held
        else:
            self._quiet.pop(held.lease.lease, None)

    def _preemptible(self, leases: Mapping[LeaseId, Held]) -> tuple[Preemptible, ...]:
        return tuple(
            Preemptible(
                lease=held.lease.lease,
                node=held.lease.node,
                tenant=held.lease.tenant,
                cores=held.lease.resources.cores,
                memory_bytes=held.lease.resources.memory_bytes,
                gpus=held.lease.resources.gpus,
                amounts=held.lease.resources.amounts,
                created_s=held.lease.created_s,
                leaving=held.lease.state is LeaseState.DRAINING,
                idle=held.lease.lease in self._quiet,
            )
            for held in leases.values()
            if held.lease.node is not None and _may_be_pushed_out(held.lease)
        )

    def _step(self, lease: Lease, event: Event) -> tuple[Lease, tuple[Effect, ...]]:
        stepped, effects = step(lease, event)
        return self._priced(lease, stepped), effects

    def _priced(self, before: Lease, after: Lease) -> Lease:
        cost = self._pricing.of_growth(before, after)
        return msgspec.structs.replace(after, price=before.price + cost) if cost else after

    def _row(self, held: Held, lease: Lease, event: str, detail: str = "") -> Transition:
        return Transition(
            lease=lease, request=held.request, event=event, at_s=self._clock.now(), detail=detail
        )

    def _enter(self, held: Held) -> None:
        self.open[held.lease.lease] = held
        if held.lease.node is not None:
            self._book(held.lease, +1)

    def _move(self, held: Held, lease: Lease) -> None:
        before, held.lease = held.lease, lease
        self._accounts.bill(before, lease, self._clock.now())
        if before.node is None and lease.node is not None:
            self._book(lease, +1)
        if lease.state is LeaseState.ENDED:
            del self.open[lease.lease]
            self._quiet.pop(lease.lease, None)
            if lease.node is not None:
                self._book(lease, -1)

    def _book(self, lease: Lease, sign: int) -> None:
        assert lease.node is not None
        self.nodes.take(lease.node, lease.resources, sign)
        self.tenants[lease.tenant] = _add(self.tenants.get(lease.tenant, Holding()), lease, sign)
        if self.tenants[lease.tenant].leases == 0:
            del self.tenants[lease.tenant]
        pool = self.pools.get(lease.pool, Pool())
        self.pools[lease.pool] = msgspec.structs.replace(pool, held=_add(pool.held, lease, sign))


def _add(holding: Holding, lease: Lease, sign: int) -> Holding:
    return Holding(
        cores=holding.cores + sign * lease.resources.cores,
        memory_bytes=holding.memory_bytes + sign * lease.resources.memory_bytes,
        gpus=holding.gpus + sign * lease.resources.gpus,
        leases=holding.leases + sign,
        amounts=kinds.sums(holding.amounts, lease.resources.amounts, sign),
    )


def _pool(settings: PoolSettings) -> Pool:
    return Pool(minimum=settings.minimum, maximum=settings.maximum)


def _may_be_pushed_out(lease: Lease) -> bool:
    if lease.state is LeaseState.DRAINING:
        return lease.end_reason is not EndReason.NODE_LOST
    return lease.state is LeaseState.ACTIVE and lease.lease_class is LeaseClass.ELASTIC
