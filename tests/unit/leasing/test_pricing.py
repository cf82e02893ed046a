"""Prices at a real site: of all that is held, at what it cost when it was held."""

import msgspec
import pytest

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import SettingsError
from isthmus.core.model import EndReason, LeaseClass, Resources, Usage
from isthmus.core.settings import PriceSettings, load
from tests.unit.leasing.rooms import ALICE, BOB, SETTINGS, Room, granted, in_a_room

PRICES = PriceSettings(
    currency="EUR", core_h=1.0, memory_gib_h=0.5, gpu_h=100.0, cache_gib_h=2.0, bandwidth_gbit_h=3.0,
    licenses={"matlab": 10.0}, classes={"harvested": 0.2, "elastic": 0.5},
)  # fmt: skip
PRICED = msgspec.structs.replace(SETTINGS, prices=PRICES, licenses={"matlab": 4})
DEARER = msgspec.structs.replace(PRICED, prices=msgspec.structs.replace(PRICES, core_h=2.0))
ASKED = LeaseRequest(
    resources=Resources(cores=2, memory="4GiB", licenses={"matlab": 1}), lease_class=LeaseClass.RESERVED
)
PER_H = 2 * 1.0 + 4 * 0.5 + 10.0
AN_HOUR, TWO_HOURS = Usage(allocated_core_s=2 * 3600.0), Usage(allocated_core_s=4 * 3600.0)


@in_a_room(settings=PRICED)
async def test_a_lease_costs_what_it_holds_for_as_long_as_it_holds_it(room: Room) -> None:
    lease = await granted(room, ALICE, ASKED)
    await room.beat(usage=AN_HOUR)
    assert room.leasing.lease(ALICE, lease).price == pytest.approx(PER_H)
    await room.tell_end(lease, EndReason.RELEASED, usage=TWO_HOURS)
    assert room.leasing.lease(ALICE, lease).price == pytest.approx(2 * PER_H)
    (row,) = room.leasing.bill(ALICE)
    assert (row.price, row.currency) == (pytest.approx(2 * PER_H), "EUR")
    assert room.leasing.bill(BOB) == []


@in_a_room(settings=PRICED)
async def test_a_class_has_its_factor(room: Room) -> None:
    lease = await granted(room, ALICE, msgspec.structs.replace(ASKED, lease_class=LeaseClass.ELASTIC))
    await room.beat(usage=AN_HOUR)
    assert room.leasing.lease(ALICE, lease).price == pytest.approx(PER_H / 2)


@in_a_room(settings=PRICED)
async def test_another_price_changes_nothing_about_the_past(room: Room) -> None:
    lease = await granted(room, ALICE, ASKED)
    await room.beat(usage=AN_HOUR)
    (row,) = room.leasing.bill(ALICE)
    assert row.price == pytest.approx(PER_H)
    room.settings = DEARER
    room.restart()
    await room.clock.sleep(0.1)
    await room.join()
    await room.beat(usage=TWO_HOURS)
    assert room.leasing.lease(ALICE, lease).price == pytest.approx(2 * PER_H + 2.0)
    (row,) = room.leasing.bill(ALICE)
    assert row.price == pytest.approx(2 * PER_H + 2.0)


@in_a_room()
async def test_a_site_without_prices_has_none_on_its_bills(room: Room) -> None:
    lease = await granted(room, ALICE)
    await room.tell_end(lease, EndReason.RELEASED, usage=AN_HOUR)
    (row,) = room.leasing.bill(ALICE)
    assert (row.price, row.currency) == (0.0, "")


def test_prices_are_settings_like_others(tmp_path) -> None:
    path = tmp_path / "isthmus.toml"
    path.write_text(
        '[leasing.prices]\ncurrency = "credits"\ncore_h = 1\nlicenses = { matlab = 2 }\n'
        "classes = { harvested = 0.2 }\n"
    )
    prices = load(path, {"ISTHMUS_LEASING__PRICES__GPU_H": "3.5"}).leasing.prices
    assert (prices.currency, prices.core_h, prices.gpu_h) == ("credits", 1.0, 3.5)
    assert prices.classes == {"harvested": 0.2}


@pytest.mark.parametrize("wrong", ["core = 1", "core_h = -1", "classes = { lent = 1 }", 'currency = "a b;"'])
def test_a_wrong_price_is_refused_with_its_path(tmp_path, wrong) -> None:
    path = tmp_path / "isthmus.toml"
    path.write_text(f"[leasing.prices]\n{wrong}\n")
    with pytest.raises(SettingsError, match=r"leasing\.prices"):
        load(path, {})
