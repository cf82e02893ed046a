"""Credits bound the items under way; a generator is always closed."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.node.functions import Loop
from isthmus.node.interruption import CallInterrupted
from isthmus.node.streams import STREAM_CREDITS, Items, Window, send_all


def _guard(code: Any, *args: Any) -> Any:
    return code(*args)


@given(count=st.integers(0, 30), credits=st.integers(1, 5), grants=st.integers(1, 5))
def test_no_more_items_are_under_way_than_the_credits_allow(count: int, credits: int, grants: int) -> None:
    window = Window(credits)
    allowed = credits
    sent: list[int] = []

    def wait() -> None:
        nonlocal allowed
        assert len(sent) == allowed
        allowed += grants
        window.grant(grants)

    send_all(Items(iter(range(count)), Loop()), window, _guard, sent.append, wait)
    assert sent == list(range(count))


def test_a_call_that_names_no_window_gets_the_default() -> None:
    assert Window(0).open == STREAM_CREDITS


def test_the_return_value_of_a_generator_is_kept() -> None:
    def items() -> Iterator[int]:
        yield 1
        return "value"  # type: ignore[return-value]

    assert send_all(Items(items(), Loop()), Window(5), _guard, lambda item: None, lambda: None) == "value"


def test_a_generator_is_closed_when_the_call_stops_while_waiting_for_credit() -> None:
    closed = []

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    def stop() -> None:
        raise CallInterrupted("cancel")

    with pytest.raises(CallInterrupted):
        send_all(Items(items(), Loop()), Window(2), _guard, lambda item: None, stop)
    assert closed


def test_asynchronous_generators_are_drained_and_closed() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        yield 2

    loop = Loop()
    sent: list[int] = []
    assert send_all(Items(items(), loop), Window(5), _guard, sent.append, lambda: None) is None  # type: ignore[arg-type]
    loop.close()
    assert sent == [1, 2]
