"""Whoever waits for a lease gets an answer, whatever goes wrong while it is taken."""

import threading

import pytest

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import FabricError, IsthmusError
from isthmus.sdk.keeping import Keeper
from isthmus.sdk.work import Pool


class BrokenSupply:
    def take(self, request: LeaseRequest) -> list[object]:
        raise RuntimeError("not what anybody expected")


class Refusals:
    def __init__(self) -> None:
        self.came = threading.Event()
        self.errors: list[IsthmusError] = []

    def refused(self, pool: Pool, error: IsthmusError) -> None:
        self.errors.append(error)
        self.came.set()


def test_an_error_of_no_known_kind_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    keeper = Keeper(BrokenSupply(), lambda holding, hello: None)  # type: ignore[arg-type]
    keeper.bind(refusals)  # type: ignore[arg-type]
    try:
        keeper.request(Pool("p", LeaseRequest(), 1), LeaseRequest())
        assert refusals.came.wait(5.0), "nobody was told"
    finally:
        keeper.close()
    (error,) = refusals.errors
    assert isinstance(error, FabricError)
    assert isinstance(error.__cause__, RuntimeError)
    assert "RuntimeError" in str(error)
