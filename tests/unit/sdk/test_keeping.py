"""Whoever waits for a lease gets an answer, whatever goes wrong while it is taken."""

import threading

import pytest

from isthmus.core.api import LeaseRequest, Renewal
from isthmus.core.errors import FabricError, IsthmusError
from isthmus.core.ids import ExecutorId, LeaseId
from isthmus.sdk.keeping import Keeper
from isthmus.sdk.links import Link
from isthmus.sdk.supply import Holding
from isthmus.sdk.work import Pool


class BrokenSupply:
    def take(self, request: LeaseRequest) -> list[object]:
        raise RuntimeError("not what anybody expected")

    def hang_up(self) -> None: ...


class Forgetful(BrokenSupply):
    """Fails at the first renewal, and notes what is given back."""

    def __init__(self) -> None:
        self.renewals = 0
        self.renewed = threading.Event()
        self.returned = threading.Event()

    def take(self, request: LeaseRequest) -> list[Holding]:
        return [Holding(LeaseId("ls_1"), ExecutorId("ex_1"), "unix:/nowhere", "token", 0.3)]

    def renew(self, leases: tuple[LeaseId, ...]) -> tuple[Renewal, ...]:
        self.renewals += 1
        if self.renewals == 1:
            raise RuntimeError("not what anybody expected")
        self.renewed.set()
        return ()

    def give_back(self, holding: Holding) -> None:
        self.returned.set()


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


def test_a_failed_connection_gives_the_lease_back_and_says_what_happened() -> None:
    def connect(holding: Holding, hello: object) -> object:
        raise OSError("no such thing")

    supply = Forgetful()
    keeper = Keeper(supply, connect)  # type: ignore[arg-type]
    try:
        with pytest.raises(FabricError, match="OSError: no such thing"):
            keeper.take(LeaseRequest())
        assert supply.returned.is_set()
        assert keeper.leases() == []
    finally:
        keeper.close()


def test_a_renewal_that_fails_oddly_does_not_end_renewing() -> None:
    supply = Forgetful()
    keeper = Keeper(supply, lambda holding, hello: None)  # type: ignore[arg-type]
    keeper.bind(Refusals())  # type: ignore[arg-type]
    try:
        keeper.take(LeaseRequest())
        assert supply.renewed.wait(10.0), "nothing was renewed after the failure"
    finally:
        keeper.close()
    assert supply.returned.is_set()


def test_a_lease_that_cannot_be_used_is_an_answer_too(caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy(Refusals):
        def granted(self, pool: Pool, links: list[object]) -> None:
            raise OverflowError("not what anybody expected")

    refusals, supply = Clumsy(), Forgetful()
    keeper = Keeper(supply, lambda holding, hello: Link(None, holding))  # type: ignore[arg-type]
    keeper.bind(refusals)  # type: ignore[arg-type]
    try:
        keeper.request(Pool("p", LeaseRequest(), 1), LeaseRequest())
        assert refusals.came.wait(5.0), "nobody was told"
        assert supply.returned.is_set(), "it would be renewed for nobody"
        assert keeper.leases() == []
    finally:
        keeper.close()
    assert "OverflowError" in str(refusals.errors[0])
