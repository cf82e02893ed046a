"""Licences at a real site: leased, waited for, billed, and never more of them than there are."""

import asyncio
import sqlite3
from pathlib import Path

import msgspec
import pytest

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import DeniedError, NoCapacityError
from isthmus.core.ids import LeaseId, RequestId, TenantId
from isthmus.core.model import EndReason, Lease, Resources, Usage
from isthmus.leasing import Ledger
from isthmus.leasing.accounts import Accounts
from isthmus.leasing.ledger import SCHEMA_VERSION, Batch, Transition
from tests.unit.leasing.rooms import ADMIN, ALICE, BOB, SETTINGS, Room, granted, in_a_room, patient

TWO = LeaseRequest(resources=Resources(licenses={"matlab": 2}))
FOUR_THERE = msgspec.structs.replace(SETTINGS, licenses={"matlab": 4})
MATLAB = "licenses.matlab"


def _counts(room: Room) -> tuple[int, int]:
    (row,) = room.leasing.licenses()
    return row.held, row.free


@in_a_room(settings=FOUR_THERE)
async def test_licences_are_leased_waited_for_and_given_back(room: Room) -> None:
    first, second = await granted(room, ALICE, TWO), await granted(room, BOB, TWO)
    assert _counts(room) == (4, 0)
    with pytest.raises(NoCapacityError, match="4 of 4 'matlab' licences are held; each lease needs 2"):
        await room.leasing.request(ALICE, TWO)
    waiting = asyncio.ensure_future(granted(room, BOB, patient(TWO)))
    await room.clock.sleep(0.1)
    await room.leasing.release(ALICE, first)
    assert await waiting not in (first, second)
    assert _counts(room) == (4, 0)


@in_a_room(settings=FOUR_THERE)
async def test_a_lease_says_that_its_licences_are_counted_only(room: Room) -> None:
    lease = room.leasing.lease(ALICE, await granted(room, ALICE, TWO))
    assert lease.enforcement.amounts == {MATLAB: "accounted-only"}


@in_a_room(settings=FOUR_THERE)
async def test_more_than_there_are_is_denied_and_says_so(room: Room) -> None:
    with pytest.raises(DeniedError, match="the site has 4 'matlab' licences, and 5 are asked for"):
        await room.leasing.request(ALICE, LeaseRequest(resources=Resources(licenses={"matlab": 5})))
    with pytest.raises(DeniedError, match="no 'ansys' licences, and 1 are asked for; it has 4 'matlab'"):
        await room.leasing.request(ALICE, LeaseRequest(resources=Resources(licenses={"ansys": 1})))


@in_a_room(settings=FOUR_THERE)
async def test_a_restarted_site_knows_who_holds_what(room: Room) -> None:
    await granted(room, ALICE, TWO)
    room.restart()
    await room.clock.sleep(0.1)
    await room.join()
    assert _counts(room) == (2, 2)


@in_a_room(settings=FOUR_THERE)
async def test_what_was_held_is_on_the_bill_and_counts_for_the_share(room: Room) -> None:
    lease = await granted(room, ALICE, TWO)
    await room.beat(usage=Usage(allocated_core_s=3600.0))  # one core for an hour, and two licences
    await room.tell_end(lease, EndReason.RELEASED, usage=Usage(allocated_core_s=3600.0))
    (row,) = room.leasing.bill(ALICE)
    assert row.amount_s == {MATLAB: 7200.0}
    assert room.leasing.bill(BOB) == []
    (standing, _), *_ = room.leasing.standings(ADMIN)
    assert standing.dominant == MATLAB


def test_bills_of_licences_survive_a_restart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    accounts = Accounts(24 * 3600.0, ())
    before, after = _lease(), _lease(usage=Usage(allocated_core_s=60.0))
    accounts.bill(before, after, 7200.0)
    accounts.bill(before, after, 7200.0)
    ledger.write(Batch(hours=accounts.unwritten()))
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite3")
    assert [row.amount_s for row in again.hours()] == [{MATLAB: 240.0}]
    assert Accounts(24 * 3600.0, again.hours()).lately[TenantId("alice")].amount_s[MATLAB] == 240.0
    again.close()


def test_a_ledger_from_before_further_kinds_is_kept_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    ledger = Ledger(path)
    plain = _lease(resources=Resources(), usage=Usage(allocated_core_s=5.0))
    ledger.write(Batch(transitions=(_step(plain),)))
    ledger.close()
    _make_old(path)
    again = Ledger(path)
    assert again.open_leases() == [(RequestId("rq_1"), plain)]
    again.write(Batch(transitions=(_step(_lease("ls_2", usage=Usage(allocated_core_s=7.0))),)))
    (row,) = again.bill(None)
    assert (row.allocated_core_s, row.amount_s) == (12.0, {MATLAB: 14.0})
    again.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_what_is_forgotten_is_forgotten_with_its_amounts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    ended = _lease(ended_s=100.0, state="ended", usage=Usage(allocated_core_s=7.0))
    ledger.write(Batch(transitions=(_step(ended),)))
    ledger.prune(200.0)
    with sqlite3.connect(ledger.path) as database:
        assert database.execute("SELECT * FROM lease_amounts").fetchall() == []
    ledger.close()


def _lease(name: str = "ls_1", **changes: object) -> Lease:
    body = {
        "lease": LeaseId(name), "tenant": "alice", "resources": {"licenses": {"matlab": 2}},
        "lease_class": "elastic", "environment": {}, "state": "active", "created_s": 1.0,
    }  # fmt: skip
    return msgspec.convert(body | {key: msgspec.to_builtins(value) for key, value in changes.items()}, Lease)


def _step(lease: Lease) -> Transition:
    return Transition(lease=lease, request=RequestId("rq_1"), event="Started", at_s=1.0)


def _make_old(path: Path) -> None:
    """As the first version of the schema left it."""
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE lease_amounts")
        database.execute("DROP TABLE hour_amounts")
        database.execute("PRAGMA user_version=1")
        body = database.execute("SELECT body FROM leases").fetchone()[0]
        old = msgspec.msgpack.decode(body)
        del old["resources"]["licenses"], old["enforcement"]["amounts"]
        database.execute("UPDATE leases SET body=?", (msgspec.msgpack.encode(old),))
    database.close()
