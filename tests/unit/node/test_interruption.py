"""Cancels that come before their call, behind it, or too late."""

import pytest

from isthmus.core.errors import CallCancelledError, CallTimeoutError
from isthmus.node import interruption
from isthmus.node.interruption import CANCELS_MAX, Cancels, answer, reason_of


def test_a_cancel_is_taken_once_by_its_call() -> None:
    cancels = Cancels()
    cancels.put(1, 7, "cancel", queued=False)
    assert cancels.take(2, 7) is None
    assert cancels.take(1, 7) == "cancel"
    assert cancels.take(1, 7) is None
    assert not cancels.calls


def test_a_cancel_whose_call_never_comes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_OVERTAKEN_S", -1.0)
    cancels = Cancels()
    cancels.put(1, 7, "cancel", queued=False)
    cancels.put(1, 8, "timeout", queued=True)
    assert cancels.take(1, 99) is None
    assert cancels.take(1, 7) is None
    assert cancels.take(1, 8) == "timeout"


def test_a_client_s_cancels_go_with_it() -> None:
    cancels = Cancels()
    cancels.put(1, 7, "cancel", queued=True)
    cancels.put(2, 7, "cancel", queued=True)
    cancels.forget(1)
    assert cancels.take(1, 7) is None
    assert cancels.take(2, 7) == "cancel"


def test_cancels_are_bounded() -> None:
    cancels = Cancels()
    for call in range(CANCELS_MAX + 5):
        cancels.put(1, call, "cancel", queued=True)
    assert cancels.take(1, 0) is None
    assert cancels.take(1, CANCELS_MAX + 4) == "cancel"


def test_a_cancel_that_overtook_its_call_is_not_forgotten_when_the_call_must_wait() -> None:
    cancels = Cancels()
    cancels.put(1, 7, "cancel", queued=False)
    cancels.queue(1, 7, deadline_ns=10**12)
    assert cancels.take(1, 7) == "cancel"


def test_reasons_become_typed_errors() -> None:
    assert isinstance(answer(reason_of(b"timeout"), running=True), CallTimeoutError)
    assert isinstance(answer(reason_of(b"anything"), running=False), CallCancelledError)


def test_a_call_whose_deadline_passes_in_the_queue_times_out() -> None:
    cancels = Cancels()
    cancels.queue(1, 7, deadline_ns=1)
    cancels.queue(1, 8, deadline_ns=10**12)
    assert cancels.take(1, 8) is None
    assert cancels.take(1, 7) == "timeout"
    assert not cancels.calls
