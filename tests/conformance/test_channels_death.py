"""A peer that dies is noticed within a second, whatever either side does, and LOST is the last of it."""

import inspect
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from isthmus.core.errors import FabricError, PeerLostError
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.frames import Kind
from tests.conformance.channel_pairs import (
    PAIRS,
    Pair,
    PeerProcess,
    Peers,
    ask,
    connected,
    hello,
    receive_until_lost,
    send,
)
from tests.conformance.channel_peer import Act

NOTICED_S = float(os.environ.get("ISTHMUS_TEST_NOTICED_S", "1"))  # more where processors are emulated
MIB = 2**20


@pytest.fixture
def mortal(pair: Pair, peers: Peers) -> Iterator[PeerProcess]:
    """A peer for this test alone."""
    peer = peers.fresh(pair)
    yield peer
    peer.stop()


def lost_after(domain: Domain, spin_s: float, moment: list[float]) -> list[Frame]:
    frames: list[Frame] = []
    while not frames or frames[-1].kind != Kind.LOST:
        frame = domain.poll(10.0, spin_s)
        if frame is not None:
            frames.append(frame)
    assert time.monotonic() - moment[0] < NOTICED_S
    return frames


@pytest.mark.parametrize("spin_s", [0.0, 10.0], ids=["asleep", "spinning"])
def test_a_killed_peer_is_noticed_within_a_second(pair: Pair, mortal: PeerProcess, spin_s: float) -> None:
    with connected(pair, mortal) as (domain, channel):
        ask(domain, channel, Act.ECHO)
        moment = [0.0]

        def kill() -> None:
            moment[0] = time.monotonic()
            mortal.signal(signal.SIGKILL)

        timer = threading.Timer(0.05, kill)
        timer.start()
        frames = lost_after(domain, spin_s, moment)
        timer.join()
        assert [frame.kind for frame in frames] == [Kind.LOST]
        assert (frames[0].channel_id, bool(frames[0].meta)) == (channel.id, True)
        assert not channel.alive
        assert domain.poll(0.05) is None
        with pytest.raises(PeerLostError):
            channel.send(Kind.CALL, 1, 0, b"")


@pytest.mark.parametrize("spin_s", [0.0, 10.0], ids=["asleep", "spinning"])
def test_a_call_to_a_peer_that_dies_raises(pair: Pair, mortal: PeerProcess, spin_s: float) -> None:
    with connected(pair, mortal) as (domain, channel):
        began_s = time.monotonic()
        with pytest.raises(PeerLostError):
            channel.call(1, Act.DIE, b"", (), 0, spin_s, 10.0)
        assert time.monotonic() - began_s < NOTICED_S
        assert [frame.kind for frame in receive_until_lost(domain)] == [Kind.LOST]


def test_frames_that_arrived_before_the_death_come_before_lost(pair: Pair, mortal: PeerProcess) -> None:
    with connected(pair, mortal) as (domain, channel):
        ask(domain, channel, Act.ECHO)
        send(domain, channel, Act.BURST_AND_DIE, 1, b"50")
        time.sleep(0.2)  # the death shall be noticed together with the frames, not after them
        *frames, last = receive_until_lost(domain)
        expected = [str(number).encode() for number in range(50)] + [b"done"]
        if pair.scheme == "rdma":  # what the dead had not put on the wire died with it
            expected = expected[: len(frames)]
        assert [frame.meta for frame in frames] == expected
        assert last.kind == Kind.LOST
        assert domain.poll(0.05) is None


@pytest.mark.parametrize("size", [64 * MIB, 300 * 1024])
def test_a_peer_killed_while_it_receives_is_lost(pair: Pair, mortal: PeerProcess, size: int) -> None:
    with connected(pair, mortal) as (domain, channel):
        ask(domain, channel, Act.ECHO)
        mortal.signal(signal.SIGSTOP)
        channel.send(Kind.CALL, 1, Act.TAKE, b"", (bytes(size),))
        domain.poll(0.05)
        moment = [time.monotonic()]
        mortal.signal(signal.SIGKILL)
        assert [frame.kind for frame in lost_after(domain, 0.0, moment)] == [Kind.LOST]


def test_a_peer_killed_while_it_sends_is_lost_and_no_torn_frame_arrives(
    pair: Pair, mortal: PeerProcess
) -> None:
    with connected(pair, mortal) as (domain, channel):
        send(domain, channel, Act.GIVE_AND_DIE, 1, str(64 * MIB).encode())
        *frames, last = receive_until_lost(domain)
        assert last.kind == Kind.LOST
        assert [len(frame.data or b"") for frame in frames] in ([], [64 * MIB])


@pytest.mark.parametrize("way", [b"fork", b"exec"])
def test_a_child_of_the_peer_does_not_keep_its_channels_alive(
    pair: Pair, mortal: PeerProcess, way: bytes
) -> None:
    with connected(pair, mortal) as (domain, channel):
        began_s = time.monotonic()
        send(domain, channel, Act.FORK_AND_DIE, 1, way)
        assert [frame.kind for frame in receive_until_lost(domain)] == [Kind.LOST]
        assert time.monotonic() - began_s < NOTICED_S + 1.0


def test_one_peers_death_leaves_the_others_alone(pair: Pair, peers: Peers, mortal: PeerProcess) -> None:
    with connected(pair, mortal) as (domain, doomed):
        channel = domain.connect(peers.kept(pair).address, hello())
        send(domain, doomed, Act.DIE, 1)
        assert ask(domain, channel, Act.ECHO, b"alive").meta == b"alive"
        assert receive_until_lost(domain)[-1].channel_id == doomed.id
        assert ask(domain, channel, Act.ECHO, b"still").meta == b"still"


def test_a_death_that_no_poll_has_told_of_can_be_asked_for(pair: Pair, mortal: PeerProcess) -> None:
    with connected(pair, mortal) as (domain, channel):
        ask(domain, channel, Act.ECHO)
        assert not channel.has_ended()
        mortal.stop()
        assert channel.has_ended()
        assert receive_until_lost(domain)[-1].kind == Kind.LOST
        assert channel.has_ended()


def test_nobody_answers_where_a_peer_has_died(pair: Pair, mortal: PeerProcess) -> None:
    with connected(pair, mortal) as (domain, _):
        mortal.stop()
        with pytest.raises(PeerLostError):
            domain.connect(mortal.address, hello(), 1.0)


def in_a_child(check: object) -> int:
    """Exit code of a forked child that runs `check`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if check() else 1  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refuses(act: object) -> bool:
    try:
        act()  # type: ignore[operator]
    except FabricError:
        return True
    print("not refused:", inspect.getsource(act).strip(), flush=True)  # type: ignore[arg-type]
    return False


@pytest.mark.filterwarnings("ignore:This process")  # newer Pythons warn that threads of the suite exist
def test_a_forked_child_cannot_use_the_domain_and_harms_nobody(pair: Pair, peers: Peers) -> None:
    with connected(pair, peers.kept(pair)) as (domain, channel):
        ask(domain, channel, Act.ECHO)
        acts = (
            lambda: domain.poll(0.0),
            lambda: domain.connect(peers.kept(pair).address, hello()),
            lambda: domain.listen("tcp://127.0.0.1:0", lambda _: None),  # type: ignore[arg-type, return-value]
            lambda: domain.channel(channel.id),
            lambda: domain.wake(),
            lambda: channel.send(Kind.CALL, 1, 0, b""),
            lambda: channel.call(1, 0, b"", (), 0, 0.0, 1.0),
            lambda: channel.send_urgent(Kind.CANCEL, 1),
        )
        assert in_a_child(lambda: all(map(refuses, acts))) == 0, "a child could use one of the methods"
        assert ask(domain, channel, Act.ECHO, b"still").meta == b"still"


@pytest.mark.parametrize("pair", PAIRS[:2])
def test_what_a_child_writes_into_received_data_stays_its_own(pair: Pair, peers: Peers) -> None:
    with connected(pair, peers.kept(pair)) as (domain, channel):
        data = ask(domain, channel, Act.ECHO, b"", (b"x" * MIB,)).data
        assert data is not None

        def overwrite() -> bool:
            data[:2] = b"yy"
            return bytes(data[:3]) == b"yyx"

        assert in_a_child(overwrite) == 0
        assert bytes(data[:3]) == b"xxx"


def test_a_channel_is_known_by_its_number(pair: Pair, peers: Peers) -> None:
    with connected(pair, peers.kept(pair)) as (domain, channel):
        found: Channel | None = domain.channel(channel.id)
        assert found is channel
        assert domain.channel(10**6) is None
        assert channel.peer.pid == peers.kept(pair).process.pid  # type: ignore[union-attr]
        native = pair.client == pair.server == "ucx"
        expected = "ucx:" if native else f"sockets:{pair.scheme}"
        assert channel.transport.startswith(expected)
