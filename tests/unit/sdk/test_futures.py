"""A wait that ends early says so; what a function raised stays what it was."""

import pytest

from isthmus.sdk.futures import Future


def test_a_wait_that_ends_early_says_how_long_it_was_and_that_the_call_goes_on() -> None:
    future: Future[int] = Future()
    with pytest.raises(TimeoutError, match=r"no result within 0.01 s; the call goes on"):
        future.result(timeout_s=0.01)
    with pytest.raises(TimeoutError, match="no result within 0 s"):
        future.exception(0)


def test_a_time_out_of_the_function_itself_keeps_its_words() -> None:
    future: Future[int] = Future()
    future.set_exception(TimeoutError("the disk"))
    with pytest.raises(TimeoutError, match="the disk"):
        future.result(timeout_s=0.01)
