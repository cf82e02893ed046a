"""A wait that ends early says so; what a function raised stays what it was."""

from types import SimpleNamespace

import pytest

from isthmus.sdk.actors import Method
from isthmus.sdk.futures import Future, outcome


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


class LastMoment(Future[int]):
    """Settles between the end of a wait and the look whether it is done."""

    def done(self) -> bool:
        if not super().done():
            self.set_result(7)
        return super().done()


def test_a_value_that_comes_at_the_last_moment_is_given() -> None:
    assert LastMoment().result(timeout_s=0.0) == 7
    assert LastMoment().exception(timeout_s=0.0) is None


class Impatient:
    """A driver whose user presses Ctrl-C."""

    def __init__(self) -> None:
        self.cancelled: list[Future[int]] = []

    def wait(self, future: Future[int], deadline_s: float | None) -> None:
        raise KeyboardInterrupt

    def follow(self, future: Future[int]) -> None: ...

    def cancel(self, future: Future[int]) -> bool:
        self.cancelled.append(future)
        return True


def test_an_interrupted_wait_for_a_call_cancels_it() -> None:
    driver = Impatient()
    future: Future[int] = Future(driver)
    with pytest.raises(KeyboardInterrupt):
        outcome(future)
    assert driver.cancelled == [future]
    assert future.cancelled()


def test_an_interrupted_wait_for_a_method_of_an_actor_cancels_its_call() -> None:
    future: Future[int] = Future(Impatient())
    method = Method(SimpleNamespace(_start=lambda *_: future), "add")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        method.call(1)
    assert future.cancelled()
