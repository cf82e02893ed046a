"""Signals for the rules, from a file or a URL."""

import asyncio
import ssl
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.clock import SystemClock
from isthmus.core.settings import PolicySettings
from isthmus.gateway.signals import BYTES_MAX, SIGNALS_MAX, SignalError, Signals, parse


def _signals(source: str, stale_s: float = 900.0) -> tuple[Signals, list[Mapping[str, float]]]:
    told: list[Mapping[str, float]] = []
    settings = PolicySettings(signals=source, signals_stale_s=stale_s)
    return Signals(settings, told.append, SystemClock()), told


def test_numbers_at_the_top_level_count() -> None:
    body = b'{"carbon": 312, "price": 0.5, "zone": "DE", "ok": true, "more": {"x": 1}}'
    assert parse(body) == {"carbon": 312.0, "price": 0.5}


@pytest.mark.parametrize("body", [b"", b"[1]", b"nonsense", b'{"carbon": 1'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(SignalError):
        parse(body)


def test_too_many_are_refused_with_the_number_that_is_taken() -> None:
    numbers = ",".join(f'"signal{index}": 1' for index in range(SIGNALS_MAX + 1))
    with pytest.raises(SignalError, match="65 signals; at most 64 are taken"):
        parse(f"{{{numbers}}}".encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_signals_or_a_signal_error(body: bytes) -> None:
    try:
        signals = parse(body)
    except SignalError:
        return
    assert all(isinstance(value, float) for value in signals.values())


def test_a_file_is_read_and_a_missing_one_changes_nothing_until_it_is_stale(tmp_path: Path) -> None:
    source = tmp_path / "signals.json"
    source.write_text('{"carbon": 100}')
    signals, told = _signals(str(source))
    asyncio.run(signals.read_once())
    assert told == [{"carbon": 100.0}]
    source.write_text("half writ")
    asyncio.run(signals.read_once())
    source.unlink()
    asyncio.run(signals.read_once())
    assert told == [{"carbon": 100.0}]


def test_stale_signals_are_forgotten(tmp_path: Path) -> None:
    signals, told = _signals(str(tmp_path / "missing"), stale_s=1e-9)
    signals._read_at -= 1.0
    asyncio.run(signals.read_once())
    assert told == [{}]


def test_a_url_is_fetched_and_one_that_says_too_much_is_not_believed() -> None:
    async def story() -> list[Mapping[str, float]]:
        answers = [("200 OK", b'{"carbon": 7}'), ("200 OK", b" " * (BYTES_MAX + 1)), ("500 Oh No", b"{}")]

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            status, body = answers.pop(0)
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()[:2]
        signals, told = _signals(f"http://{host}:{port}/now")
        async with server:
            for _ in range(3):
                await signals.read_once()
        await signals.read_once()  # nobody listens any more
        return told

    assert asyncio.run(story()) == [{"carbon": 7.0}]


@pytest.mark.parametrize(("scheme", "times"), [("http", 0), ("https", 1)])
def test_certificates_are_read_for_https_only_once_and_beside_the_event_loop(
    scheme: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    make_context = ssl.create_default_context

    def make_and_tell(*arguments, **options):
        threads.append(threading.current_thread())
        return make_context(*arguments, **options)

    monkeypatch.setattr(ssl, "create_default_context", make_and_tell)
    signals, told = _signals(f"{scheme}://127.0.0.1:1/")

    async def story() -> None:
        for _ in range(3):
            await signals.read_once()

    asyncio.run(story())
    assert (len(threads), told) == (times, [])
    assert threading.main_thread() not in threads
