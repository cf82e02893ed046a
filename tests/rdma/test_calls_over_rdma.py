"""Function calls over RDMA verbs: an embedded site whose processes may use nothing else (make test-rdma)."""

import os
from collections.abc import Iterator

import numpy as np
import pytest

import isthmus
from isthmus.sdk import connecting
from tests.rdma.conftest import PACKET_BYTES_MAX, Witness

RENDEZVOUS_BYTES = 4 * 2**20
EMULATED_START_S = 240.0  # emulated processors are slow, and other suites have their share of them


def add(left: int, right: int) -> int:
    return left + right


def double(array: np.ndarray) -> np.ndarray:
    return array * 2


def fail(text: str) -> None:
    raise LookupError(text)


@pytest.fixture(scope="module")
def site(device: str) -> Iterator[isthmus.Site]:
    """Its agent and executors inherit `UCX_TLS` from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connecting, "START_TIMEOUT_S", EMULATED_START_S)
        with isthmus.connect() as site:
            yield site


def test_a_small_call_runs_in_another_process(site: isthmus.Site, witness: Witness) -> None:
    assert site.call(add, 20, 22) == 42
    assert site.call(os.getpid) != os.getpid()
    assert witness.saw(2)


def test_arrays_travel_both_ways_by_rendezvous(site: isthmus.Site, witness: Witness) -> None:
    array = np.arange(RENDEZVOUS_BYTES // 8, dtype=np.int64)
    np.testing.assert_array_equal(site.call(double, array), array * 2)
    assert witness.saw(2 * RENDEZVOUS_BYTES // PACKET_BYTES_MAX)


def test_an_exception_comes_back_as_itself(site: isthmus.Site) -> None:
    with pytest.raises(LookupError, match="over the wire"):
        site.call(fail, "over the wire")


def test_a_map_keeps_its_order(site: isthmus.Site) -> None:
    assert list(site.map(add, range(50), range(50))) == list(range(0, 100, 2))
