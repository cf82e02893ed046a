"""Durable calls on disk: a row is there before the client hears of it, and its result is written once.

    queued -> running -> done | failed | cancelled
    running -> queued      on eviction, retry, or a site's restart

A tenant's calls and results take a bounded part of the disk: beyond it, further calls are refused.

Invariants: synchronous=FULL, so an acknowledged call survives power loss; a final state never changes (the
first result wins); (tenant, idempotency key) names one call for ever. Arguments and code are dropped with the
final state. All methods block for a sync: they are called from one worker thread (`jobs.py`). Payloads are
bytes, never decoded.
"""

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import msgspec

from isthmus.core.api import CallResult, CallState, CallSummary, DurableCall
from isthmus.core.databases import open_database
from isthmus.core.errors import DeniedError, NotFoundError, SiteUnavailableError
from isthmus.core.ids import CallId, LeaseId, TenantId, new_id

LIST_MAX = 10_000
ROW_BYTES = 1024  # of a call without its payloads, roughly

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    call TEXT PRIMARY KEY, tenant TEXT NOT NULL, idempotency_key TEXT NOT NULL, function TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL, charged INTEGER NOT NULL, ready_s REAL NOT NULL,
    created_s REAL NOT NULL, ended_s REAL NOT NULL, lease TEXT, detail TEXT NOT NULL,
    body BLOB, kind INTEGER NOT NULL, meta BLOB NOT NULL, data BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS calls_by_key ON calls (tenant, idempotency_key) WHERE idempotency_key != '';
CREATE INDEX IF NOT EXISTS calls_by_state ON calls (state, tenant, ready_s);
"""
_OPEN = "state IN ('queued', 'running')"
_BYTES = f"{ROW_BYTES} + ifnull(length(body), 0) + length(meta) + length(data)"
_SUMMARY = "call, function, state, attempts, created_s, ended_s, lease, detail"


class QueuedCall(NamedTuple):
    """A call that may start. `charged` failures count against its retries; evictions do not."""

    call: CallId
    tenant: TenantId
    attempts: int
    charged: int
    body: DurableCall


class Ending(NamedTuple):
    """A final state. `kind`, `meta`, `data` are the frame that answered, or an error the site made itself."""

    state: CallState
    kind: int = 0
    meta: bytes = b""
    data: bytes = b""
    detail: str = ""


class CallStore:
    """`history_s`: how long ended calls are kept. `tenant_bytes_max`: for all calls of one tenant."""

    def __init__(self, path: Path, history_s: float, tenant_bytes_max: int) -> None:
        self._history_s = history_s
        self._tenant_bytes_max = tenant_bytes_max
        self._database = open_database(path, _SCHEMA, "FULL", "all durable calls", across_threads=True)
        self._stored_bytes = self._weigh()

    def close(self) -> None:
        self._database.close()

    def recover(self) -> int:
        """After a restart: what was running starts again. How many."""
        return self._write("UPDATE calls SET state = 'queued', ready_s = 0 WHERE state = 'running'", ())

    def add(self, tenant: TenantId, body: DurableCall, now_s: float) -> CallSummary:
        """The call, on disk; the one there already when the tenant used this idempotency key before.

        Raises DeniedError when the tenant's calls take too much of the disk.
        """
        call = CallId(new_id("call"))
        packed = msgspec.msgpack.encode(body)
        if self._stored_bytes[tenant] + ROW_BYTES + len(packed) > self._tenant_bytes_max:
            return self._known(tenant, body.idempotency_key)
        added = self._write(
            "INSERT INTO calls VALUES (?, ?, ?, ?, 'queued', 0, 0, 0, ?, 0, NULL, '', ?, 0, x'', x'')"
            " ON CONFLICT DO NOTHING",
            (call, tenant, body.idempotency_key, body.function_name, now_s, packed),
        )
        self._stored_bytes[tenant] += added * (ROW_BYTES + len(packed))
        if body.idempotency_key:
            return self._one("tenant = ? AND idempotency_key = ?", (tenant, body.idempotency_key))
        return self._one("call = ?", (call,))

    def summary(self, tenant: TenantId | None, call: CallId) -> CallSummary:
        """Raises NotFoundError; a foreign tenant's call does not exist. None: whoever's."""
        return self._one("call = ? AND (? IS NULL OR tenant = ?)", (call, tenant, tenant))

    def summaries(self, tenant: TenantId | None) -> list[CallSummary]:
        """The newest first, LIST_MAX of them."""
        rows = self._database.execute(
            f"SELECT {_SUMMARY} FROM calls WHERE ? IS NULL OR tenant = ?"
            " ORDER BY created_s DESC, call DESC LIMIT ?",
            (tenant, tenant, LIST_MAX),
        )
        return [_summary(row) for row in rows]

    def result(self, tenant: TenantId | None, call: CallId) -> CallResult:
        row = self._database.execute(
            "SELECT state, kind, meta, data, detail FROM calls WHERE call = ? AND (? IS NULL OR tenant = ?)",
            (call, tenant, tenant),
        ).fetchone()
        if row is None:
            raise _unknown(call)
        state, kind, meta, data, detail = row
        return CallResult(call=call, state=state, kind=kind, meta=meta, data=data, detail=detail)

    def waiting_tenants(self, now_s: float) -> dict[TenantId, int]:
        """{tenant: calls that may start now}"""
        rows = self._database.execute(
            "SELECT tenant, count(*) FROM calls WHERE state = 'queued' AND ready_s <= ? GROUP BY tenant",
            (now_s,),
        )
        return {TenantId(tenant): count for tenant, count in rows}

    def next_ready_s(self, now_s: float) -> float | None:
        """When the next call that is backing off may start; None without one."""
        row = self._database.execute(
            "SELECT min(ready_s) FROM calls WHERE state = 'queued' AND ready_s > ?", (now_s,)
        ).fetchone()
        return None if row[0] is None else float(row[0])

    def oldest(self, tenant: TenantId, now_s: float, besides: frozenset[CallId]) -> QueuedCall | None:
        """The tenant's oldest call that may start, `besides` those that are being started."""
        ids = self._database.execute(
            "SELECT call FROM calls WHERE state = 'queued' AND tenant = ? AND ready_s <= ?"
            " ORDER BY created_s, call LIMIT ?",
            (tenant, now_s, len(besides) + 1),
        )
        call = next((CallId(row[0]) for row in ids if row[0] not in besides), None)
        if call is None:
            return None
        attempts, charged, body = self._database.execute(
            "SELECT attempts, charged, body FROM calls WHERE call = ?", (call,)
        ).fetchone()
        return QueuedCall(call, tenant, attempts, charged, msgspec.msgpack.decode(body, type=DurableCall))

    def start(self, call: CallId, lease: LeaseId) -> bool:
        """queued -> running. False: it is no longer queued (cancelled meanwhile)."""
        changed = self._write(
            "UPDATE calls SET state = 'running', lease = ?, attempts = attempts + 1"
            " WHERE call = ? AND state = 'queued'",
            (lease, call),
        )
        return changed == 1

    def requeue(self, call: CallId, ready_s: float, charge: bool, detail: str) -> None:
        """running -> queued, not to start before `ready_s`."""
        self._write(
            "UPDATE calls SET state = 'queued', ready_s = ?, charged = charged + ?, detail = ?"
            " WHERE call = ? AND state = 'running'",
            (ready_s, int(charge), detail, call),
        )

    def end(self, call: CallId, ending: Ending, now_s: float) -> bool:
        """Record the one result. False: there is one already, and it stays."""
        before = self._database.execute(
            f"SELECT tenant, ifnull(length(body), 0) FROM calls WHERE call = ? AND {_OPEN}", (call,)
        ).fetchone()
        changed = self._write(
            f"UPDATE calls SET state = ?, kind = ?, meta = ?, data = ?, detail = ?, ended_s = ?, body = NULL"
            f" WHERE call = ? AND {_OPEN}",
            (ending.state, ending.kind, ending.meta, ending.data, ending.detail, now_s, call),
        )
        if changed:
            tenant, body_bytes = before
            self._stored_bytes[tenant] += len(ending.meta) + len(ending.data) - body_bytes
        return changed == 1

    def forget(self, now_s: float) -> int:
        """Delete calls that ended longer ago than the history goes; how many."""
        forgotten = self._write(
            f"DELETE FROM calls WHERE NOT ({_OPEN}) AND ended_s < ?", (now_s - self._history_s,)
        )
        if forgotten:
            self._stored_bytes = self._weigh()
        return forgotten

    def _weigh(self) -> Counter[str]:
        rows = self._database.execute(f"SELECT tenant, sum({_BYTES}) FROM calls GROUP BY tenant")
        return Counter(dict(rows.fetchall()))

    def _known(self, tenant: TenantId, idempotency_key: str) -> CallSummary:
        """The call of this key, for a tenant that may store no further one."""
        if idempotency_key:
            with contextlib.suppress(NotFoundError):
                return self._one("tenant = ? AND idempotency_key = ?", (tenant, idempotency_key))
        raise DeniedError(
            f"durable calls of tenant {tenant} and their results hold {self._stored_bytes[tenant]} bytes, "
            f"and may hold {self._tenant_bytes_max} (jobs.tenant_bytes_max); ended ones go after "
            f"{self._history_s:g} s"
        )

    def _one(self, condition: str, values: tuple[object, ...]) -> CallSummary:
        row = self._database.execute(f"SELECT {_SUMMARY} FROM calls WHERE {condition}", values).fetchone()
        if row is None:
            raise _unknown(values[0])
        return _summary(row)

    def _write(self, statement: str, values: tuple[object, ...]) -> int:
        try:
            return self._database.execute(statement, values).rowcount
        except sqlite3.OperationalError as error:
            raise SiteUnavailableError(
                f"cannot write down durable calls: {error}; is the disk full?"
            ) from error


def _summary(row: tuple[object, ...]) -> CallSummary:
    return msgspec.convert(dict(zip(_SUMMARY.split(", "), row, strict=True)), CallSummary)


def _unknown(call: object) -> NotFoundError:
    return NotFoundError(f"no durable call {call}; `isthmus calls` lists yours")
