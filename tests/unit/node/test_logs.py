"""Captured output: read from an offset, cut at the head."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.node import logs
from isthmus.node.logs import Chunk, Log


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def test_a_log_that_nobody_wrote_is_empty(path: Path) -> None:
    assert Log(path, 8192).read(0, 100) == Chunk("", 0)
    Log(path, 8192).trim()


def test_reading_goes_on_where_it_stopped(path: Path) -> None:
    path.write_text("hello world")
    log = Log(path, 8192)
    first = log.read(0, 5)
    assert first == Chunk("hello", 5)
    assert log.read(first.next_offset, 100) == Chunk(" world", 11)
    assert log.read(500, 100) == Chunk("", 11)
    assert log.read(-3, 2) == Chunk("he", 2)


@given(st.text(max_size=60), st.integers(4, 9))
def test_no_character_is_cut_in_two(tmp_path_factory: pytest.TempPathFactory, text: str, step: int) -> None:
    path = tmp_path_factory.getbasetemp() / "characters"
    path.write_bytes(text.encode("utf-8", "replace"))
    log, offset, parts = Log(path, 8192), 0, []
    while (chunk := log.read(offset, step)).text:
        parts.append(chunk.text)
        offset = chunk.next_offset
    assert "".join(parts) == path.read_bytes().decode()


def test_bytes_that_are_no_text_do_not_stop_the_reader(path: Path) -> None:
    path.write_bytes(b"\x80\x80\x80\x80\xff" * 3)
    log = Log(path, 8192)
    assert log.read(log.read(0, 100).next_offset, 100).next_offset == 15


def test_the_newest_output_survives_a_cut_at_its_offset(path: Path) -> None:
    path.write_bytes(b"x" * 100_000 + b"end")
    log = Log(path, 8192)
    log.trim()
    chunk = log.read(0, 10**6)
    assert chunk.text.endswith("end")
    assert len(chunk.text) <= 8192
    assert chunk.next_offset in (
        100_003,
        len(chunk.text),
    )  # punched, or started anew where that is impossible
    with path.open("ab") as file:
        file.write(b"more")
    assert log.read(chunk.next_offset, 100).text == "more"


def test_a_log_within_its_limit_is_left_alone(path: Path) -> None:
    path.write_bytes(b"x" * 8192)
    log = Log(path, 8192)
    log.trim()
    assert len(log.read(0, 10**6).text) == 8192


def test_a_successor_reads_on_from_the_same_offsets(path: Path) -> None:
    path.write_bytes(b"x" * 100_000 + b"end")
    log = Log(path, 8192)
    log.trim()
    assert Log(path, 8192).read(0, 10**6) == log.read(0, 10**6)


def test_the_newest_output_survives_where_nothing_can_be_punched_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_punch", lambda descriptor, size_bytes: False)
    path.write_bytes(b"x" * 100_000 + b"end")
    log = Log(path, 8192)
    log.trim()
    chunk = log.read(0, 10**6)
    assert chunk.text.endswith("xend")
    assert chunk.next_offset == len(chunk.text) <= 8192
