"""When a call may begin: not before the answers to its client have left, whatever other clients do."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from isthmus.core.errors import CallCancelledError, CallTimeoutError
from isthmus.fabric.channels import Frame
from isthmus.fabric.codec import (
    FunctionHeader,
    decode_error,
    decode_value,
    encode_call,
    encode_function,
    encode_header,
)
from isthmus.fabric.frames import Kind
from isthmus.node.interruption import Terminated
from isthmus.node.page import Page
from isthmus.node.serving import Server

DEADLINE_NS = 1  # so short that it has passed whenever it is asked for
Event = tuple[str, int, object]


class Channel:
    """Sends into the journal that all channels share; the test says what has not left."""

    def __init__(self, number: int, journal: list[Event]) -> None:
        self.id = number
        self.unsent = False
        self._journal = journal

    def send(self, kind: int, call_id: int, function_id: int, meta: bytes, data: Sequence[Any] = ()) -> bool:
        value = decode_value(meta, None) if kind == Kind.RESULT else type(decode_error(meta, None))
        self._journal.append(("answer", self.id, value))
        return True


class Domain:
    """Gives the server a script: frames, and what happens between two polls. Terminates it at the end."""

    def __init__(self, journal: list[Event]) -> None:
        self.channels = {number: Channel(number, journal) for number in (1, 2)}
        self.script: list[Frame | Callable[[], None]] = []
        self.server: Server | None = None
        self.polls_s: list[float] = []

    def channel(self, number: int) -> Channel | None:
        return self.channels.get(number)

    def poll(self, timeout_s: float, spin_s: float = 0.0) -> Frame | None:
        self.polls_s.append(timeout_s)
        if not self.script and self.server is not None:
            self.server.terminate()
        step = self.script.pop(0) if self.script else None
        if step is None or isinstance(step, Frame):
            return step
        step()
        return None

    def wake(self) -> None: ...


@pytest.fixture
def journal() -> list[Event]:
    return []


@pytest.fixture
def domain(journal: list[Event]) -> Domain:
    return Domain(journal)


@pytest.fixture
def serve(domain: Domain, journal: list[Event], tmp_path: Path) -> Callable[..., None]:
    """Runs the script when each client has defined and called function 1: it gives its argument back."""

    def run(*script: Frame | Callable[[], None]) -> None:
        server = Server(domain, Page(tmp_path / "page", create=True), 0.0, lambda code: None)  # type: ignore[arg-type]
        header, code = encode_header(FunctionHeader(name="same")), encode_function(lambda value: value)
        for number in (1, 2):
            define = Frame(number, Kind.DEFINE, 0, 1, 0, 0, 0, header, memoryview(code))
            domain.script += define, call(number, 0), journal.clear
        domain.script += script
        domain.server = server
        with pytest.raises(Terminated):
            server.run()

    return run


def call(channel_id: int, call_id: int, deadline_ns: int = 0) -> Frame:
    """It answers with its own number."""
    meta, _ = encode_call((call_id,), {})
    return Frame(channel_id, Kind.CALL, call_id, 1, 0, deadline_ns, 0, meta, None)


def cancel(channel_id: int, call_id: int) -> Frame:
    return Frame(channel_id, Kind.CANCEL, call_id, 0, 0, 0, 0, b"cancel", None)


def test_a_call_begins_when_the_answers_before_it_have_left(
    domain: Domain, serve: Callable[..., None], journal: list[Event]
) -> None:
    first = domain.channels[1]

    def leave() -> None:
        journal.append(("left", 1, None))
        first.unsent = False

    serve(call(1, 1), lambda: setattr(first, "unsent", True), call(1, 2), call(1, 3), lambda: None, leave)
    assert journal == [("answer", 1, 1), ("left", 1, None), ("answer", 1, 2), ("answer", 1, 3)]


def test_answers_that_leave_late_are_noticed_soon(
    domain: Domain, serve: Callable[..., None], journal: list[Event]
) -> None:
    first = domain.channels[1]
    serve(
        lambda: setattr(first, "unsent", True), call(1, 1), *[lambda: None] * 20, domain.polls_s.clear,
        *[lambda: None] * 3, lambda: setattr(first, "unsent", False),
    )  # fmt: skip
    looks_s = domain.polls_s[:4]
    assert len(set(looks_s)) == 1, "no longer than the longest sleep"
    assert looks_s[0] <= 0.002
    assert journal == [("answer", 1, 1)]


def test_calls_of_other_clients_do_not_wait(
    domain: Domain, serve: Callable[..., None], journal: list[Event]
) -> None:
    first = domain.channels[1]
    serve(
        lambda: setattr(first, "unsent", True),
        call(1, 1), call(2, 2), call(1, 3), call(2, 4),
        lambda: setattr(first, "unsent", False),
    )  # fmt: skip
    assert journal == [("answer", 2, 2), ("answer", 2, 4), ("answer", 1, 1), ("answer", 1, 3)]


def test_a_definition_does_not_overtake_the_call_before_it(
    domain: Domain, serve: Callable[..., None], journal: list[Event]
) -> None:
    first = domain.channels[1]
    other = Frame(
        1, Kind.DEFINE, 0, 1, 0, 0, 0, encode_header(FunctionHeader(name="other")),
        memoryview(encode_function(lambda value: "other")),
    )  # fmt: skip
    serve(
        call(1, 1), lambda: setattr(first, "unsent", True),
        call(1, 2), other, call(1, 3),
        lambda: setattr(first, "unsent", False),
    )  # fmt: skip
    assert journal == [("answer", 1, 1), ("answer", 1, 2), ("answer", 1, "other")]


@pytest.mark.parametrize("cancelled_early", [True, False])
@pytest.mark.parametrize("deadline_ns", [0, 10**12])
def test_a_waiting_call_can_be_cancelled(
    domain: Domain,
    serve: Callable[..., None],
    journal: list[Event],
    cancelled_early: bool,
    deadline_ns: int,
) -> None:
    first = domain.channels[1]
    frames = [call(1, 1, deadline_ns), cancel(1, 1)]
    serve(
        lambda: setattr(first, "unsent", True),
        call(1, 0),
        *reversed(frames) if cancelled_early else frames,
        lambda: setattr(first, "unsent", False),
    )
    assert journal == [("answer", 1, 0), ("answer", 1, CallCancelledError)]


def test_the_time_of_a_waiting_call_passes(
    domain: Domain, serve: Callable[..., None], journal: list[Event]
) -> None:
    first = domain.channels[1]
    serve(
        lambda: setattr(first, "unsent", True),
        call(1, 1, DEADLINE_NS),
        lambda: setattr(first, "unsent", False),
    )
    assert journal == [("answer", 1, CallTimeoutError)]


def test_what_waits_for_a_client_goes_with_it(
    domain: Domain, serve: Callable[..., None], journal: list[Event]
) -> None:
    first = domain.channels[1]
    lost = Frame(1, Kind.LOST, 0, 0, 0, 0, 0, b"gone", None)

    def close() -> None:
        journal.append(("closed", 1, None))

    first.close = close  # type: ignore[attr-defined]
    serve(lambda: setattr(first, "unsent", True), call(1, 1), call(2, 2), lost, call(2, 3))
    assert journal == [("answer", 2, 2), ("closed", 1, None), ("answer", 2, 3)]
