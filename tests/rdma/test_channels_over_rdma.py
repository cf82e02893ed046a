"""Channels over RDMA verbs. Run by `make test-rdma`; the conformance suite of channels runs beside it.

UCX is told to use nothing but RDMA (`UCX_TLS`), and the device's own packet counter is the witness.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric import open_domain
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.frames import Hello, Kind, Welcome
from tests.rdma.conftest import PACKET_BYTES_MAX, Witness

EAGER_BYTES, RENDEZVOUS_BYTES = 64, 4 * 2**20
ANSWER_S = 30.0  # emulated processors are slow


@pytest.fixture
def domains() -> Iterator[tuple[Domain, Domain]]:
    caller, answerer = open_domain("ucx"), open_domain("ucx")
    yield caller, answerer
    caller.close()
    answerer.close()


class Echo:
    """Answers every CALL with its own payload, on a thread of its own."""

    def __init__(self, domain: Domain, address: str) -> None:
        self.address = domain.listen(address, _admit)
        self._domain = domain
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="echo")
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._domain.wake()
        self._thread.join()

    def _serve(self) -> None:
        while not self._stopped.is_set():
            frame = self._domain.poll(1.0)
            if frame is not None and frame.kind == Kind.CALL:
                self._answer(frame)

    def _answer(self, frame: Frame) -> None:
        channel = self._domain.channel(frame.channel_id)
        assert channel is not None
        data = () if frame.data is None else (frame.data,)
        while not channel.send(Kind.RESULT, frame.call_id, frame.function_id, frame.meta, data):
            self._domain.poll(0.1)


@pytest.fixture
def channel(domains: tuple[Domain, Domain], tmp_path: Path) -> Iterator[Channel]:
    caller, answerer = domains
    echo = Echo(answerer, f"unix:{tmp_path}/echo")
    hello = Hello(token="", python=python_version(), isthmus=ISTHMUS_VERSION)
    yield caller.connect(echo.address, hello, timeout_s=ANSWER_S)
    echo.stop()


def _admit(_hello: Hello) -> Welcome:
    return Welcome(
        executor="exe_echo",
        python=python_version(),
        isthmus=ISTHMUS_VERSION,
        channel_id=0,
        channel_key=0,
        credits=64,
    )


def test_the_report_names_the_device_and_the_transport(device: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "isthmus", "fabric", "--json"], capture_output=True, text=True, check=True
    )
    report = json.dumps(json.loads(told.stdout))
    assert device in report
    assert "rc_verbs" in report


def test_a_channel_says_that_it_uses_verbs(channel: Channel, device: str) -> None:
    assert channel.transport.startswith("ucx:")
    assert "rc_verbs" in channel.transport
    assert device in channel.transport


@pytest.mark.parametrize("size_bytes", [0, 1, EAGER_BYTES, 8192, 65536, RENDEZVOUS_BYTES])
def test_a_payload_of_any_size_comes_back_unchanged(
    channel: Channel, witness: Witness, size_bytes: int
) -> None:
    payload = np.random.default_rng(size_bytes).bytes(size_bytes)
    frame = channel.call(1, 0, b"meta", (payload,) if payload else (), 0, spin_s=0.0, timeout_s=ANSWER_S)
    assert frame is not None
    assert (frame.meta, bytes(frame.data or b"")) == (b"meta", payload)
    assert witness.saw(2 * max(1, size_bytes // PACKET_BYTES_MAX))
