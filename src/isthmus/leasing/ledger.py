"""The ledger: every lease, every transition, every decision, every node being drained, in one SQLite file.

One writer. WAL with synchronous=FULL: a commit that returned survives `kill -9` and power loss, a transaction
that did not commit leaves nothing behind. A batch is one transaction, so a request costs one sync for its
decision and grants and one for its starts.

Invariants: a lease row and the transition that led to it are written together; a failed write changes nothing
and raises LedgerError (disk full, locked, corrupt). Calls block for a sync, well below a millisecond on an
SSD: they are made from the site's loop on purpose, because nothing may be acted on before it is written.
Not here: what transitions are legal (`lifecycle.py`).
"""

import contextlib
import sqlite3
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from isthmus.core.api import BillRow, FunctionSummary
from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import LeaseId, NodeId, RequestId, TenantId
from isthmus.core.model import Lease, LeaseClass
from isthmus.policy.replay import Logged

SCHEMA_VERSION = 3  # 1 lacks the two tables of further kinds, 2 that of prices; they are added
HOURS_KEPT = 24 * 365  # beyond the history: fair share and budgets look back further than explanations
BUSY_S = 5.0  # how long a write waits for a backup or an inspection that holds the file
_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (
    lease TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    request TEXT NOT NULL,
    class TEXT NOT NULL,
    state TEXT NOT NULL,
    created_s REAL NOT NULL,
    ended_s REAL NOT NULL,
    allocated_core_s REAL NOT NULL,
    busy_core_s REAL NOT NULL,
    spin_core_s REAL NOT NULL,
    cpu_s REAL NOT NULL,
    calls INTEGER NOT NULL,
    body BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS leases_by_end ON leases (state, ended_s);
CREATE INDEX IF NOT EXISTS leases_by_request ON leases (request);
CREATE TABLE IF NOT EXISTS transitions (
    number INTEGER PRIMARY KEY,
    lease TEXT NOT NULL,
    at_s REAL NOT NULL,
    event TEXT NOT NULL,
    state TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS transitions_by_lease ON transitions (lease);
CREATE TABLE IF NOT EXISTS decisions (
    number INTEGER PRIMARY KEY,
    request TEXT NOT NULL,
    tenant TEXT NOT NULL,
    at_s REAL NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS decisions_by_request ON decisions (request);
CREATE TABLE IF NOT EXISTS functions (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    calls INTEGER NOT NULL,
    errors INTEGER NOT NULL,
    busy_s REAL NOT NULL,
    last_s REAL NOT NULL,
    PRIMARY KEY (tenant, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hours (
    tenant TEXT NOT NULL,
    hour INTEGER NOT NULL,
    core_s REAL NOT NULL,
    memory_byte_s REAL NOT NULL,
    gpu_s REAL NOT NULL,
    PRIMARY KEY (tenant, hour)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lease_amounts (
    lease TEXT NOT NULL,
    kind TEXT NOT NULL,
    amount_s REAL NOT NULL,
    PRIMARY KEY (lease, kind)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lease_prices (lease TEXT PRIMARY KEY, price REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hour_amounts (
    tenant TEXT NOT NULL,
    hour INTEGER NOT NULL,
    kind TEXT NOT NULL,
    amount_s REAL NOT NULL,
    PRIMARY KEY (tenant, hour, kind)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS draining_nodes (node TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_WRITE_LEASE = """
INSERT INTO leases VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT (lease) DO UPDATE SET
    state=excluded.state, ended_s=excluded.ended_s, allocated_core_s=excluded.allocated_core_s,
    busy_core_s=excluded.busy_core_s, spin_core_s=excluded.spin_core_s, cpu_s=excluded.cpu_s,
    calls=excluded.calls, body=excluded.body
"""
_ADD_HOUR = """
INSERT INTO hours VALUES (?,?,?,?,?) ON CONFLICT (tenant, hour) DO UPDATE SET core_s=core_s+excluded.core_s,
    memory_byte_s=memory_byte_s+excluded.memory_byte_s, gpu_s=gpu_s+excluded.gpu_s
"""
_ADD_HOUR_AMOUNT = """
INSERT INTO hour_amounts VALUES (?,?,?,?)
ON CONFLICT (tenant, hour, kind) DO UPDATE SET amount_s=amount_s+excluded.amount_s
"""
_BILL_AMOUNTS = """
SELECT class, kind, sum(amount_s) FROM lease_amounts JOIN leases USING (lease)
WHERE (?1 IS NULL OR tenant = ?1) GROUP BY class, kind ORDER BY class, kind
"""
_BILL = """
SELECT class, count(*), sum(allocated_core_s), sum(busy_core_s), sum(spin_core_s), sum(cpu_s), sum(calls),
    coalesce(sum(price), 0.0)
FROM leases LEFT JOIN lease_prices USING (lease)
WHERE (?1 IS NULL OR tenant = ?1) GROUP BY class ORDER BY class
"""


class LedgerError(SiteUnavailableError):
    """The ledger could not be read or written; nothing was changed. Names the file and the cause."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one lease; `lease` is how it stands afterwards."""

    lease: Lease
    request: RequestId
    event: str
    at_s: float
    detail: str = ""


class HourUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant was billed within one hour (counted from the epoch), in resource-seconds."""

    tenant: TenantId
    hour: int
    core_s: float
    memory_byte_s: float
    gpu_s: float
    amount_s: dict[str, float] = {}


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What is written in one transaction.

    updates   leases whose usage or executors changed without a transition
    functions counters to add, by tenant
    hours     bills to add, by tenant and hour
    """

    transitions: tuple[Transition, ...] = ()
    decisions: tuple[Logged, ...] = ()
    updates: tuple[tuple[RequestId, Lease], ...] = ()
    functions: tuple[tuple[TenantId, FunctionSummary], ...] = ()
    hours: tuple[HourUse, ...] = ()
    drained: tuple[NodeId, ...] = ()
    resumed: tuple[NodeId, ...] = ()


class Ledger:
    """Opens (and creates) the file at once. `path` may be ":memory:" or an SQLite URI, for tests."""

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        with self._typed():
            self._database = sqlite3.connect(
                self.path, timeout=BUSY_S, isolation_level=None, uri=self.path.startswith("file:")
            )
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._migrate()

    def close(self) -> None:
        self._database.close()

    # writing ------------------------------------------------------------------------------------------------
    def write(self, batch: Batch) -> None:
        """All of the batch, or nothing. Raises LedgerError."""
        with self._transaction() as database:
            for transition in batch.transitions:
                self._write_transition(database, transition)
            for request, lease in batch.updates:
                self._write_lease(database, request, lease)
            for logged in batch.decisions:
                self._write_decision(database, logged)
            for tenant, row in batch.functions:
                self._add_function(database, tenant, row)
            for use in batch.hours:
                self._add_hour(database, use)
            for node in batch.drained:
                database.execute("INSERT OR IGNORE INTO draining_nodes VALUES (?)", (node,))
            for node in batch.resumed:
                database.execute("DELETE FROM draining_nodes WHERE node=?", (node,))

    def amend(self, lease: Lease) -> None:
        """The final usage of a lease that has ended already. Unknown leases are left alone."""
        request = self.request_of(lease.lease)
        if request is not None:
            self.write(Batch(updates=((request, lease),)))

    def prune(self, before_s: float) -> int:
        """Forget leases that ended, and decisions made, before this time; how many leases that were."""
        ended = "SELECT lease FROM leases WHERE state='ended' AND ended_s < ?"
        with self._transaction() as database:
            database.execute(f"DELETE FROM transitions WHERE lease IN ({ended})", (before_s,))
            for table in ("lease_amounts", "lease_prices"):
                database.execute(f"DELETE FROM {table} WHERE lease IN ({ended})", (before_s,))
            leases = database.execute(f"DELETE FROM leases WHERE lease IN ({ended})", (before_s,)).rowcount
            orphaned = "request NOT IN (SELECT request FROM leases)"
            database.execute(f"DELETE FROM decisions WHERE at_s < ? AND {orphaned}", (before_s,))
            for table in ("hours", "hour_amounts"):
                oldest = int(before_s // 3600) - HOURS_KEPT
                database.execute(f"DELETE FROM {table} WHERE hour < ?", (oldest,))
        return leases

    # reading ------------------------------------------------------------------------------------------------
    def open_leases(self) -> list[tuple[RequestId, Lease]]:
        """Every lease that has not ended, oldest first."""
        rows = self._rows("SELECT request, body FROM leases WHERE state != 'ended' ORDER BY created_s, lease")
        return [(RequestId(request), _unpack(body)) for request, body in rows]

    def ended_leases(self, tenant: TenantId | None, limit: int = 1000) -> list[Lease]:
        """The most recent ones, newest first; of all tenants if None."""
        rows = self._rows(
            "SELECT body FROM leases WHERE state = 'ended' AND (?1 IS NULL OR tenant = ?1) "
            "ORDER BY ended_s DESC, lease LIMIT ?2",
            (tenant, limit),
        )
        return [_unpack(body) for (body,) in rows]

    def lease(self, lease: LeaseId) -> Lease | None:
        rows = self._rows("SELECT body FROM leases WHERE lease = ?", (lease,))
        return _unpack(rows[0][0]) if rows else None

    def request_of(self, lease: LeaseId) -> RequestId | None:
        rows = self._rows("SELECT request FROM leases WHERE lease = ?", (lease,))
        return RequestId(rows[0][0]) if rows else None

    def transitions(self, lease: LeaseId) -> list[tuple[float, str, str, str]]:
        """(seconds since the epoch, event, state afterwards, detail), oldest first."""
        sql = "SELECT at_s, event, state, detail FROM transitions WHERE lease = ? ORDER BY number"
        return self._rows(sql, (lease,))

    def decisions(self, request: RequestId | None = None, limit: int = 10_000) -> Iterator[Logged]:
        """Newest first; all requests if None."""
        rows = self._rows(
            "SELECT body FROM decisions WHERE (?1 IS NULL OR request = ?1) ORDER BY number DESC LIMIT ?2",
            (request, limit),
        )
        for (body,) in rows:
            yield msgspec.msgpack.decode(zlib.decompress(body), type=Logged)

    def functions(self, tenant: TenantId | None) -> list[FunctionSummary]:
        """Counters of leases that ended; summed over tenants if None."""
        rows = self._rows(
            "SELECT name, sum(calls), sum(errors), sum(busy_s), max(last_s) FROM functions "
            "WHERE (?1 IS NULL OR tenant = ?1) GROUP BY name ORDER BY name",
            (tenant,),
        )
        return [
            FunctionSummary(name=name, calls=calls, errors=errors, busy_s=busy_s, last_s=last_s)
            for name, calls, errors, busy_s, last_s in rows
        ]

    def bill(self, tenant: TenantId | None) -> list[BillRow]:
        """What was used over the kept history, by lease class; of all tenants if None."""
        amounts: dict[str, dict[str, float]] = {}
        for lease_class, kind, amount_s in self._rows(_BILL_AMOUNTS, (tenant,)):
            amounts.setdefault(lease_class, {})[kind] = amount_s
        return [
            BillRow(
                lease_class=LeaseClass(lease_class),
                leases=leases,
                allocated_core_s=allocated,
                busy_core_s=busy,
                spin_core_s=spin,
                cpu_s=cpu,
                calls=calls,
                amount_s=amounts.get(lease_class, {}),
                price=price,
            )
            for lease_class, leases, allocated, busy, spin, cpu, calls, price in self._rows(_BILL, (tenant,))
        ]

    def hours(self) -> list[HourUse]:
        """What tenants were billed, hour by hour, oldest first."""
        amounts: dict[tuple[str, int], dict[str, float]] = {}
        for tenant, hour, kind, amount_s in self._rows(
            "SELECT tenant, hour, kind, amount_s FROM hour_amounts ORDER BY hour, tenant, kind"
        ):
            amounts.setdefault((tenant, hour), {})[kind] = amount_s
        sql = "SELECT tenant, hour, core_s, memory_byte_s, gpu_s FROM hours ORDER BY hour, tenant"
        return [
            HourUse(
                tenant=tenant, hour=hour, core_s=core_s, memory_byte_s=memory_byte_s, gpu_s=gpu_s,
                amount_s=amounts.get((tenant, hour), {}),
            )
            for tenant, hour, core_s, memory_byte_s, gpu_s in self._rows(sql)
        ]  # fmt: skip

    def draining_nodes(self) -> set[NodeId]:
        return {NodeId(node) for (node,) in self._rows("SELECT node FROM draining_nodes ORDER BY node")}

    # inside -------------------------------------------------------------------------------------------------
    def _write_transition(self, database: sqlite3.Connection, step: Transition) -> None:
        self._write_lease(database, step.request, step.lease)
        database.execute(
            "INSERT INTO transitions (lease, at_s, event, state, detail) VALUES (?,?,?,?,?)",
            (step.lease.lease, step.at_s, step.event, step.lease.state.value, step.detail),
        )

    def _write_lease(self, database: sqlite3.Connection, request: RequestId, lease: Lease) -> None:
        used = lease.usage
        values = (lease.lease, lease.tenant, request, lease.lease_class.value, lease.state.value)
        times = (lease.created_s, lease.ended_s, used.allocated_core_s, used.busy_s, used.spin_s, used.cpu_s)
        database.execute(_WRITE_LEASE, (*values, *times, used.calls, _pack(lease)))
        held_s = used.allocated_core_s / lease.resources.cores
        amounts = [(lease.lease, kind, held_s * count) for kind, count in lease.resources.amounts.items()]
        database.executemany("INSERT OR REPLACE INTO lease_amounts VALUES (?,?,?)", amounts)
        if lease.price:
            database.execute("INSERT OR REPLACE INTO lease_prices VALUES (?,?)", (lease.lease, lease.price))

    def _write_decision(self, database: sqlite3.Connection, logged: Logged) -> None:
        body = zlib.compress(msgspec.msgpack.encode(logged), 1)
        values = (logged.demand.request, logged.demand.tenant, logged.snapshot.clock_s, body)
        database.execute("INSERT INTO decisions (request, tenant, at_s, body) VALUES (?,?,?,?)", values)

    def _add_function(self, database: sqlite3.Connection, tenant: TenantId, row: FunctionSummary) -> None:
        database.execute(
            "INSERT INTO functions VALUES (?,?,?,?,?,?) ON CONFLICT (tenant, name) DO UPDATE SET "
            "calls=calls+excluded.calls, errors=errors+excluded.errors, busy_s=busy_s+excluded.busy_s, "
            "last_s=max(last_s, excluded.last_s)",
            (tenant, row.name, row.calls, row.errors, row.busy_s, row.last_s),
        )

    def _add_hour(self, database: sqlite3.Connection, use: HourUse) -> None:
        values = (use.tenant, use.hour, use.core_s, use.memory_byte_s, use.gpu_s)
        database.execute(_ADD_HOUR, values)
        amounts = [(use.tenant, use.hour, *amount) for amount in use.amount_s.items()]
        database.executemany(_ADD_HOUR_AMOUNT, amounts)

    def _migrate(self) -> None:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if not 0 <= version <= SCHEMA_VERSION:
            raise LedgerError(
                f"ledger {self.path} has schema {version}, this isthmus writes {SCHEMA_VERSION}; "
                "use the isthmus that wrote it, or move the file away"
            )
        self._database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._typed():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._commit()
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _commit(self) -> None:
        self._database.execute("COMMIT")

    def _rows(self, sql: str, values: Iterable[object] = ()) -> list[Any]:
        with self._typed():
            return self._database.execute(sql, tuple(values)).fetchall()

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(f"ledger {self.path}: {error}; nothing was changed") from error


def _pack(lease: Lease) -> bytes:
    return msgspec.msgpack.encode(lease)


def _unpack(body: bytes) -> Lease:
    return msgspec.msgpack.decode(body, type=Lease)
