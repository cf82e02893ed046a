"""The RDMA device under test: a real one, or the soft-RoCE device of the guest of `make test-rdma`."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.channel_pairs import ONLY

DEVICES = Path("/sys/class/infiniband")
COUNTERS = ("hw_counters/sent_pkts", "counters/port_xmit_packets")
COUNTER_CACHE_S_MAX = 2.0
PACKET_BYTES_MAX = 4096  # the largest MTU of InfiniBand and RoCE


@pytest.fixture(scope="session")
def device() -> str:
    names = sorted(path.name for path in DEVICES.glob("*"))
    if not names:
        pytest.skip("this machine has no RDMA device; `make test-rdma` boots a guest that has one")
    chosen = os.environ.get("UCX_NET_DEVICES", "").split(":")[0]
    return chosen if chosen in names else names[0]


@pytest.fixture(scope="session", autouse=True)
def only_rdma(device: str) -> Iterator[None]:
    """Neither this process nor those it starts may use shared memory or TCP for frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", ONLY["rdma"][0])
        yield


class Witness:
    """The device's own packet counter: the proof that bytes went by RDMA and by no other way."""

    def __init__(self, device: str) -> None:
        port = DEVICES / device / "ports" / "1"
        found = [port / name for name in COUNTERS if (port / name).exists()]
        assert found, f"{device} counts no packets"
        self._counter = found[0]
        self._start = self._read()

    def saw(self, packets: int) -> bool:
        """Whether the device has sent so many packets since the test began. The kernel caches the counter."""
        until_s = time.monotonic() + COUNTER_CACHE_S_MAX
        while self._read() - self._start < packets:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.01)
        return True

    def _read(self) -> int:
        return int(self._counter.read_text())


@pytest.fixture
def witness(device: str) -> Witness:
    return Witness(device)
