"""What the channel suites share: each pair of domains, and peer processes that outlive a test."""

from collections.abc import Iterator

import pytest

from tests.conformance.channel_pairs import PAIRS, Pair, Peers


@pytest.fixture(scope="module")  # tests of other modules look for processes that are left
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peers]:
    peers = Peers(tmp_path_factory.mktemp("peers"))
    yield peers
    peers.stop()


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param
