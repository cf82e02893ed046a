"""Counters on pages become usage."""

import time
from pathlib import Path

import pytest

from isthmus.core.ids import LeaseId
from isthmus.node.isolation import Rlimits, Share
from isthmus.node.metering import function_uses, idle_s, lease_usage
from isthmus.node.page import BUSY, CALLS, CPU, ERRORS, HELD, LAST, RUNNING, SPIN, Page, Row
from tests.unit.node.test_records import RECORD

S = 10**9


def _page(path: Path, **words: int) -> Page:
    page = Page(path, create=True)
    row = page.add_row("f")
    page[row + CALLS], page[row + ERRORS], page[row + BUSY] = 2, 1, 3 * S
    page[SPIN], page[CPU] = 4 * S, 5 * S
    return page


def test_pages_of_dead_and_living_executors_add_up(tmp_path: Path) -> None:
    isolation = Rlimits("tag")
    isolation.create(LeaseId("ls_a"), Share((1,), 2**30))
    usage = lease_usage(RECORD, [_page(tmp_path / "a"), _page(tmp_path / "b")], isolation)
    assert (usage.calls, usage.errors, usage.busy_s, usage.spin_s, usage.cpu_s) == (4, 2, 6.0, 8.0, 10.0)
    assert usage.allocated_core_s == pytest.approx(time.monotonic(), rel=0.1)


def test_a_lease_is_idle_since_its_last_call_and_never_while_one_runs(tmp_path: Path) -> None:
    page = Page(tmp_path / "a", create=True)
    assert idle_s(RECORD, [page], 1 + 2 * S) == 0.0, "its client may be on the way"
    assert idle_s(RECORD, [page], 1 + 7 * S) == 2.0
    page[page.add_row("f") + LAST] = 5 * S
    assert idle_s(RECORD, [page], 7 * S) == 2.0
    page[RUNNING] = 1
    assert idle_s(RECORD, [page], 99 * S) == 0.0
    page[RUNNING], page[HELD] = 0, 1
    assert idle_s(RECORD, [page], 99 * S) == 0.0


def test_rows_of_one_function_add_up() -> None:
    rows = [Row("f", 1, 0, S, 90 * S), Row("g", 1, 1, S, 0), Row("f", 2, 1, S, 95 * S)]
    uses = {use.name: use for use in function_uses(rows, now_s=1000.0, now_ns=100 * S)}
    assert (uses["f"].calls, uses["f"].errors, uses["f"].busy_s, uses["f"].last_s) == (3, 1, 2.0, 995.0)
    assert uses["g"].last_s == 0.0
