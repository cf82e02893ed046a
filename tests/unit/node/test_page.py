"""The lease page: what one side writes the other reads."""

from pathlib import Path

import pytest

from isthmus.core.errors import FrameError
from isthmus.node.page import (
    BUSY,
    CALLS,
    DEADLINE,
    ERRORS,
    LAST,
    OTHERS,
    PAGE_BYTES,
    ROWS_MAX,
    Page,
    Row,
)


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(tmp_path / "page", create=True)


def test_two_mappings_of_a_page_see_each_other(page: Page, tmp_path: Path) -> None:
    other = Page(tmp_path / "page")
    page[DEADLINE] = 2**63
    page.address = "unix:/é"
    assert (other[DEADLINE], other.address) == (2**63, "unix:/é")


def test_rows_count_functions_by_name(page: Page) -> None:
    row = page.add_row("f")
    for word, value in ((CALLS, 3), (ERRORS, 1), (BUSY, 70), (LAST, 9)):
        page[row + word] = value
    page.add_row("g")
    assert page.add_row("f") == row
    assert page.rows() == [Row("f", 3, 1, 70, 9), Row("g", 0, 0, 0, 0)]


def test_functions_beyond_the_last_row_are_counted_together(page: Page) -> None:
    rows = [page.add_row(f"f{number}") for number in range(ROWS_MAX + 20)]
    assert len(set(rows)) == ROWS_MAX
    assert page.rows()[-1].name == OTHERS
    assert max(rows) + 12 <= PAGE_BYTES // 8


def test_a_long_name_is_cut_between_characters(page: Page) -> None:
    page.add_row("ä" * 100)
    assert page.rows()[0].name == "ä" * 31


def test_a_detached_page_keeps_its_counts_to_itself(page: Page, tmp_path: Path) -> None:
    page.detach()
    page[DEADLINE] = 7
    assert Page(tmp_path / "page")[DEADLINE] == 0


@pytest.mark.parametrize("content", [b"", b"x" * PAGE_BYTES, b"short"])
def test_a_file_that_is_no_page_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stranger"
    path.write_bytes(content)
    with pytest.raises(FrameError, match="no lease page"):
        Page(path)
