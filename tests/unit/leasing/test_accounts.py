"""Bills by the hour: what fair share and budgets of core-hours look back on."""

import msgspec
import pytest

from isthmus.core.ids import LeaseId, TenantId
from isthmus.core.model import Environment, Lease, LeaseClass, LeaseState, Resources, Usage
from isthmus.leasing import Ledger
from isthmus.leasing.accounts import Accounts
from isthmus.leasing.ledger import Batch

NOON_S = 12 * 3600.0
ALICE = TenantId("alice")


def _lease(core_h: float) -> Lease:
    return Lease(
        lease=LeaseId("ls_1"),
        tenant=ALICE,
        resources=Resources(cores=2, memory="1GiB"),
        lease_class=LeaseClass.ELASTIC,
        environment=Environment(),
        state=LeaseState.ACTIVE,
        usage=Usage(allocated_core_s=core_h * 3600.0),
    )


def _bill(accounts: Accounts, core_h: float, at_s: float) -> None:
    accounts.bill(_lease(0.0), _lease(core_h), at_s)


def test_core_hours_are_counted_over_the_last_hours_and_fall_out_of_the_window() -> None:
    accounts = Accounts(0.0, ())
    _bill(accounts, 3.0, NOON_S)
    _bill(accounts, 2.0, NOON_S + 3 * 3600)
    assert accounts.spent_core_h(ALICE, 24, NOON_S + 3 * 3600) == 5.0
    assert accounts.spent_core_h(ALICE, 3, NOON_S + 3 * 3600) == 2.0
    assert accounts.spent_core_h(TenantId("bob"), 24, NOON_S) == 0.0


def test_a_bill_that_does_not_grow_changes_nothing() -> None:
    accounts = Accounts(3600.0, ())
    accounts.bill(_lease(2.0), _lease(1.0), NOON_S)
    assert not accounts.lately
    assert not accounts.unwritten()


def test_what_was_written_gives_the_same_picture_after_a_restart() -> None:
    ledger = Ledger(":memory:")
    accounts = Accounts(24 * 3600.0, ())
    for hour in range(48):
        _bill(accounts, 1.0 + hour % 3, NOON_S + hour * 3600)
        ledger.write(Batch(hours=accounts.unwritten()))
        accounts.written()
        _bill(accounts, 0.5, NOON_S + hour * 3600)  # the same hour again: added
    ledger.write(Batch(hours=accounts.unwritten()))
    again = Accounts(24 * 3600.0, ledger.hours())
    now_s = NOON_S + 48 * 3600
    for window_h in (1, 24, 168):
        assert again.spent_core_h(ALICE, window_h, now_s) == accounts.spent_core_h(ALICE, window_h, now_s)
    assert again.lately[ALICE].core_s == pytest.approx(accounts.lately[ALICE].core_s, rel=0.03)
    memory_per_core = again.lately[ALICE].memory_byte_s / again.lately[ALICE].core_s
    assert memory_per_core == pytest.approx(2**30 / 2)
    ledger.close()


def test_old_hours_are_forgotten_in_memory() -> None:
    accounts = Accounts(0.0, ())
    for day in range(120):
        _bill(accounts, 1.0, NOON_S + day * 86400)
    assert len(accounts._core_s[ALICE]) <= 32
    assert msgspec.structs.astuple(accounts.lately[ALICE])[0] == 3600.0
