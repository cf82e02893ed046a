"""The ledger keeps what it acknowledged, and nothing of what it did not."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from isthmus.core.api import FunctionSummary
from isthmus.core.ids import LeaseId, NodeId, RequestId, TenantId
from isthmus.core.model import EndReason, Environment, Lease, LeaseClass, LeaseState, Resources, Usage
from isthmus.leasing import Ledger, LedgerError
from isthmus.leasing import ledger as ledger_module
from isthmus.leasing.ledger import Batch, Transition
from isthmus.policy import ALLOW_ALL, Logged, decide
from tests.unit.policy.situations import demand, node, snapshot

ALICE, BOB = TenantId("alice"), TenantId("bob")


def _lease(name: str = "ls_1", tenant: TenantId = ALICE, **changes: object) -> Lease:
    lease = Lease(
        lease=LeaseId(name),
        tenant=tenant,
        resources=Resources(),
        lease_class=LeaseClass.ELASTIC,
        environment=Environment(),
        state=LeaseState.ACTIVE,
        created_s=100.0,
    )
    return msgspec.structs.replace(lease, **changes)


def _step(lease: Lease, event: str = "Started", request: str = "rq_1") -> Transition:
    return Transition(lease=lease, request=RequestId(request), event=event, at_s=100.0)


def _ended(name: str, at_s: float, **changes: object) -> Lease:
    return _lease(name, state=LeaseState.ENDED, ended_s=at_s, end_reason=EndReason.RELEASED, **changes)


@pytest.fixture
def ledger(tmp_path: Path):
    opened = Ledger(tmp_path / "ledger.sqlite3")
    yield opened
    opened.close()


def test_what_was_written_is_there_after_reopening(ledger: Ledger) -> None:
    ledger.write(Batch(transitions=(_step(_lease()), _step(_ended("ls_2", 200.0))), drained=(NodeId("n0"),)))
    again = Ledger(ledger.path)
    assert again.open_leases() == [(RequestId("rq_1"), _lease())]
    assert again.lease(LeaseId("ls_2")) == _ended("ls_2", 200.0)
    assert again.request_of(LeaseId("ls_2")) == "rq_1"
    assert again.draining_nodes() == {"n0"}
    again.write(Batch(resumed=(NodeId("n0"),)))
    assert again.draining_nodes() == set()
    again.close()


def test_a_lease_row_is_its_latest_transition(ledger: Ledger) -> None:
    ledger.write(
        Batch(transitions=(_step(_lease(state=LeaseState.STARTING), "StartOrdered"), _step(_lease())))
    )
    assert [event for _, event, _, _ in ledger.transitions(LeaseId("ls_1"))] == ["StartOrdered", "Started"]
    assert ledger.lease(LeaseId("ls_1")) == _lease()


def test_ended_leases_are_listed_by_tenant_newest_first(ledger: Ledger) -> None:
    leases = [_ended("ls_1", 200.0), _ended("ls_2", 300.0, tenant=BOB), _ended("ls_3", 250.0)]
    ledger.write(Batch(transitions=tuple(_step(lease) for lease in leases)))
    assert [lease.lease for lease in ledger.ended_leases(None)] == ["ls_2", "ls_3", "ls_1"]
    assert [lease.lease for lease in ledger.ended_leases(ALICE, limit=1)] == ["ls_3"]


def test_decisions_come_back_whole(ledger: Ledger) -> None:
    situation = snapshot(node("a"), node("b", free=1))
    logged = Logged(
        demand=demand(), snapshot=situation.record(), decision=decide(ALLOW_ALL, situation, demand())
    )
    ledger.write(Batch(decisions=(logged,)))
    assert list(ledger.decisions(RequestId("rq_1"))) == [logged]
    assert list(ledger.decisions(RequestId("rq_2"))) == []


def test_bills_and_functions_add_up(ledger: Ledger) -> None:
    used = Usage(allocated_core_s=4.0, busy_s=1.0, spin_s=0.5, cpu_s=1.2, calls=10)
    ledger.write(
        Batch(transitions=(_step(_ended("ls_1", 200.0, usage=used)), _step(_lease("ls_2", usage=used))))
    )
    (row,) = ledger.bill(ALICE)
    assert (row.leases, row.allocated_core_s, row.spin_core_s, row.calls) == (2, 8.0, 1.0, 20)
    assert ledger.bill(BOB) == []
    counted = FunctionSummary(name="f", calls=2, errors=1, busy_s=0.5, last_s=9.0)
    for tenant in (ALICE, ALICE, BOB):
        ledger.write(Batch(functions=((tenant, counted),)))
    assert ledger.functions(ALICE)[0].calls == 4
    assert ledger.functions(None)[0].calls == 6


def test_old_history_is_forgotten_and_open_leases_never(ledger: Ledger) -> None:
    old, late, active = _ended("ls_1", 200.0), _ended("ls_2", 400.0), _lease("ls_3")
    steps = (_step(old), _step(late, request="rq_2"), _step(active, request="rq_3"))
    ledger.write(Batch(transitions=steps))
    assert ledger.prune(300.0) == 1
    assert ledger.lease(LeaseId("ls_1")) is None
    assert ledger.transitions(LeaseId("ls_1")) == []
    assert ledger.lease(LeaseId("ls_2")) == late
    assert ledger.lease(LeaseId("ls_3")) == active


def test_a_full_disk_is_a_typed_error_and_changes_nothing(ledger: Ledger) -> None:
    ledger.write(Batch(transitions=(_step(_lease()),)))
    pages = ledger._database.execute("PRAGMA page_count").fetchone()[0]
    ledger._database.execute(f"PRAGMA max_page_count={pages}")
    many = tuple(_step(_lease(f"ls_{i}", labels={"text": "x" * 1000})) for i in range(100))
    with pytest.raises(LedgerError, match="full; nothing was changed"):
        ledger.write(Batch(transitions=many))
    assert [lease.lease for _, lease in ledger.open_leases()] == ["ls_1"]
    ledger._database.execute("PRAGMA max_page_count=1000000")
    ledger.write(Batch(transitions=many))
    assert len(ledger.open_leases()) == 100


def test_a_locked_database_is_a_typed_error(ledger: Ledger) -> None:
    ledger._database.execute("PRAGMA busy_timeout=1")
    intruder = sqlite3.connect(ledger.path)
    intruder.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match="locked"):
        ledger.write(Batch(transitions=(_step(_lease()),)))
    intruder.close()
    ledger.write(Batch(transitions=(_step(_lease()),)))


def test_a_ledger_of_another_schema_is_refused(ledger: Ledger) -> None:
    ledger._database.execute("PRAGMA user_version=99")
    with pytest.raises(LedgerError, match="schema 99"):
        Ledger(ledger.path)


def test_a_file_that_is_no_database_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    path.write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(LedgerError):
        Ledger(path)


def test_renewals_wait_for_nobody_because_reads_and_writes_share_one_connection(ledger: Ledger) -> None:
    assert ledger._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert ledger._database.execute("PRAGMA synchronous").fetchone()[0] == 2, "FULL"
    assert ledger_module.BUSY_S > 0


WRITER = """
import sys
from isthmus.leasing import Ledger
from isthmus.leasing.ledger import Batch
from tests.unit.leasing.test_ledger import _lease, _step
ledger = Ledger(sys.argv[1])
for i in range(1_000_000):
    pair = (_step(_lease(f"ls_{i}a")), _step(_lease(f"ls_{i}b")))
    ledger.write(Batch(transitions=pair))
    print(i, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 40])
def test_a_killed_writer_loses_nothing_that_it_acknowledged_and_leaves_no_half(
    tmp_path: Path, acknowledged: int
) -> None:
    path = tmp_path / "ledger.sqlite3"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert writer.stdout is not None
    with writer.stdout as lines:
        for _ in range(acknowledged):
            last = int(lines.readline())
        writer.send_signal(signal.SIGKILL)
        rest = lines.read().split()
    writer.wait()
    last = int(rest[-1]) if rest else last
    ledger = Ledger(path)
    names = {lease.lease for _, lease in ledger.open_leases()}
    ledger.close()
    assert {f"ls_{i}{half}" for i in range(last + 1) for half in "ab"} <= names
    assert len(names) % 2 == 0, "both leases of a batch, or none"
