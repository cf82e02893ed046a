"""What every channel promises: whole frames, in order, none lost. One suite for all domains."""

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.core.errors import FabricError, FunctionLoadError, PeerLostError
from isthmus.fabric import open_domain
from isthmus.fabric.channels import Channel, Domain, Frame, Meter
from isthmus.fabric.codec import decode_error
from isthmus.fabric.frames import Flag, Kind
from tests.conformance.channel_pairs import (
    DOMAINS,
    PAIRS,
    Pair,
    Peers,
    ask,
    connected,
    descriptor_count,
    hello,
    receive,
    send,
    transports,
)
from tests.conformance.channel_peer import Act, admit

KIB, MIB, GIB = 2**10, 2**20, 2**30
FULL_FRAMES_MAX = 200_000  # a channel that takes more than this without an answer has no limit
LIBRARY = """
#include <stdint.h>
#include <string.h>
int32_t reverse(const void *arguments, uint64_t bytes, void *result, uint64_t *result_bytes) {
    if (bytes > *result_bytes) return 7;
    for (uint64_t i = 0; i < bytes; ++i) ((char *)result)[i] = ((const char *)arguments)[bytes - 1 - i];
    *result_bytes = bytes;
    return 0;
}
"""


@pytest.fixture
def link(pair: Pair, peers: Peers) -> Iterator[tuple[Domain, Channel]]:
    with connected(pair, peers.kept(pair)) as link:
        yield link


def shared_files() -> set[str]:
    """Files of shared memory that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}


def available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("MemAvailable"))


# whole frames -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, 1, 63, 64, 8 * KIB - 1, 8 * KIB, 8 * KIB + 1, 256 * KIB, MIB, 64 * MIB])
def test_data_of_any_size_comes_back_unchanged(link: tuple[Domain, Channel], size: int) -> None:
    domain, channel = link
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    frame = ask(domain, channel, Act.ECHO, b"meta", (data,))
    assert (frame.kind, frame.meta) == (Kind.RESULT, b"meta")
    assert (frame.data or b"") == data


@pytest.mark.parametrize("size", [0, 1, 8 * KIB - 64, 8 * KIB, 100_000, 3 * MIB])
def test_meta_of_any_size_comes_back_unchanged(link: tuple[Domain, Channel], size: int) -> None:
    domain, channel = link
    meta = bytes(size // 2) + b"m" * (size - size // 2)
    frame = ask(domain, channel, Act.ECHO, meta, (b"d",))
    assert frame.meta == meta
    assert frame.data == b"d"


@pytest.mark.parametrize("size", [3, 700])
def test_many_buffers_arrive_one_after_the_other(link: tuple[Domain, Channel], size: int) -> None:
    domain, channel = link
    buffers = tuple(bytes([number % 256]) * (size + number % 3) for number in range(2000))
    assert ask(domain, channel, Act.ECHO, b"", buffers).data == b"".join(buffers)


def test_buffers_of_every_type_are_taken(link: tuple[Domain, Channel]) -> None:
    _, channel = link
    wide = memoryview(b"\0\1\2\3\4\5\6\7").cast("I")
    frame = channel.call(
        1, Act.ECHO, bytearray(b"m"), (b"a", bytearray(b"b"), wide, b"", memoryview(b"c")), 0, 0.0, 10.0
    )
    assert frame is not None
    assert (frame.meta, bytes(frame.data or b"")) == (b"m", b"ab\0\1\2\3\4\5\6\7c")


def test_received_data_is_writable_and_outlives_its_channel(pair: Pair, peers: Peers) -> None:
    with connected(pair, peers.kept(pair)) as (domain, channel):
        small = ask(domain, channel, Act.ECHO, b"", (b"x" * 100,)).data
        large = ask(domain, channel, Act.ECHO, b"", (b"y" * MIB,)).data
    assert small is not None
    assert large is not None
    small[0] = large[0] = 0
    assert bytes(small[:2]) == b"\0x"
    assert bytes(large[:2]) == b"\0y"
    assert large[-1] == ord("y")


def test_the_header_fields_arrive(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    assert channel.send(Kind.CALL, 2**64 - 1, Act.ABOUT, b"", (), 2**40, Flag.MORE, 17)
    [frame] = receive(domain, 1)
    assert frame.meta == f"1 1 {2**40} 17 {2**64 - 1}".encode()
    assert (frame.channel_id, frame.call_id) == (channel.id, 2**64 - 1)


@pytest.mark.skipif(available_bytes() < 10 * GIB, reason="moving 2 GiB needs 10 GiB of free memory")
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2]])
def test_two_gibibytes_go_in_one_frame(pair: Pair, peers: Peers) -> None:
    data = memoryview(bytearray(2 * GIB + 5))
    data[:8], data[-8:] = b"firstest", b"lastmost"
    with connected(pair, peers.kept(pair)) as (_, channel):
        frame = channel.call(1, Act.TAKE, b"", (data,), 0, 0.0, 60.0)
        assert frame is not None
        assert frame.meta == f"{2 * GIB + 5} ".encode() + b"firstestlastmost"


# order and back-pressure ------------------------------------------------------------------------------------
def test_frames_arrive_in_the_order_of_sending(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    send(domain, channel, Act.BURST, 5, b"5000")
    frames = receive(domain, 5001)
    assert [int(frame.meta) for frame in frames[:-1]] == list(range(5000))
    assert frames[-1].kind == Kind.RESULT


def test_small_and_large_frames_do_not_overtake_each_other(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    sizes = [0, 300 * KIB, 1, MIB, 8 * KIB, 0, 64 * KIB, 2 * MIB, 5]
    for number, size in enumerate(sizes):
        send(domain, channel, Act.ECHO, number, b"", (bytes(size),))
    frames = receive(domain, len(sizes))
    assert [frame.call_id for frame in frames] == list(range(len(sizes)))
    assert [len(frame.data or b"") for frame in frames] == sizes


def test_a_full_channel_refuses_and_loses_nothing(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    accepted = fill(domain, channel)
    answers = receive(domain, accepted)
    assert [frame.call_id for frame in answers] == list(range(accepted))
    assert answers[0].meta == b"done"
    assert all(bytes(frame.data or b"") == bytes(4 * KIB) for frame in answers[1:])


@contextlib.contextmanager
def linked(pair: Pair, directory: Path) -> Iterator[tuple[Domain, Channel, Domain, Channel]]:
    """Both ends of a channel in this process; frames flow only while the test polls."""
    address = "tcp://127.0.0.1:0" if pair.scheme == "tcp" else f"unix:{directory}/socket"
    with transports(pair.scheme):
        client, server = open_domain(pair.client), open_domain(pair.server)
    heard: list[Frame | None] = []
    listener = threading.Thread(target=lambda: heard.append(server.poll(20.0)))
    try:
        real = server.listen(address, admit)
        listener.start()
        caller = client.connect(real, hello())
        send(client, caller, Act.ECHO, 1)
        while listener.is_alive():  # over RDMA both sides must poll before a first frame can leave
            assert client.poll(0.01) is None
        answerer = server.channel(heard[0].channel_id) if heard[0] is not None else None
        assert answerer is not None
        yield client, caller, server, answerer
    finally:
        if listener.ident is not None:
            listener.join()
        client.close()
        server.close()


def receive_while_polling(other: Domain, domain: Domain, count: int) -> list[Frame]:
    """As `receive`, with the sender in this process too."""
    frames: list[Frame] = []
    deadline_s = time.monotonic() + 20
    while len(frames) < count:
        assert time.monotonic() < deadline_s, f"{len(frames)} of {count} frames within 20 s"
        assert other.poll(0.0) is None
        frames += [frame for frame in (domain.poll(0.001),) if frame is not None]
    return frames


def test_answers_that_have_not_left_hold_no_frame_back(pair: Pair, tmp_path: Path) -> None:
    """Whether a call may begin before they have is for those who run it to say: `unsent` tells."""
    with linked(pair, tmp_path) as (client, caller, server, answerer):
        answers = 0
        while not answerer.unsent:
            assert answerer.send(Kind.YIELD, 1, 0, b"answer" * 20), "full before anything is unsent"
            answers += 1
            assert answers < FULL_FRAMES_MAX, "nothing ever waits"
        assert caller.send(Kind.CALL, 2, Act.ECHO, b"")
        caller.send_urgent(Kind.CANCEL, 1)
        came = receive(server, 2)
        assert {(frame.kind, frame.call_id) for frame in came} == {(Kind.CALL, 2), (Kind.CANCEL, 1)}
        assert answerer.unsent or pair.scheme == "rdma"  # the device brings answers that nobody takes yet
        assert len(receive_while_polling(server, client, answers)) == answers
        assert server.poll(0.01) is None
        assert not answerer.unsent


def test_urgent_frames_overtake_what_is_queued(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    channel.send_urgent(Kind.CANCEL, 2**40)
    [frame] = receive(domain, 1)
    before = int(frame.meta)
    accepted = fill(domain, channel)
    channel.send_urgent(Kind.CANCEL, 2**40)
    answers = receive(domain, accepted + 1)
    [urgent] = [frame for frame in answers if frame.call_id == 2**40]
    assert int(urgent.meta) - before < accepted


def fill(domain: Domain, channel: Channel) -> int:
    """Send until the channel refuses, to a peer that naps; gives the number of accepted frames."""
    send(domain, channel, Act.NAP, 0, b"0.3")
    data = bytes(4 * KIB)
    for accepted in range(1, FULL_FRAMES_MAX):
        if not channel.send(Kind.CALL, accepted, Act.ECHO, b"", (data,)):
            return accepted
    pytest.fail(f"the channel accepted {FULL_FRAMES_MAX} frames that nobody reads")


def test_a_call_leaves_frames_for_others_to_poll(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    send(domain, channel, Act.BURST, 1, b"3")
    answer = ask(domain, channel, Act.ECHO, b"mine", call_id=2)
    assert answer.meta == b"mine"
    assert [frame.meta for frame in receive(domain, 4)] == [b"0", b"1", b"2", b"done"]


def test_a_call_gives_up_after_its_timeout(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    began_s = time.monotonic()
    assert channel.call(1, Act.HOLD, b"", (), 0, 0.01, 0.1) is None
    assert 0.05 < time.monotonic() - began_s < 2.0
    assert ask(domain, channel, Act.ECHO, b"next", call_id=2).meta == b"next"


def test_threads_may_send_while_another_polls(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    threads_count, frames_count = 4, 50

    def send_some(first: int) -> None:
        for number in range(first, first + frames_count):
            while not channel.send(Kind.CALL, number, Act.ECHO, str(number).encode(), (bytes(3000),)):
                time.sleep(0.001)

    threads = [
        threading.Thread(target=send_some, args=(index * frames_count,)) for index in range(threads_count)
    ]
    for thread in threads:
        thread.start()
    frames = receive(domain, threads_count * frames_count)
    for thread in threads:
        thread.join()
    assert sorted(frame.call_id for frame in frames) == list(range(threads_count * frames_count))
    assert all(frame.meta == str(frame.call_id).encode() for frame in frames)


def test_threads_may_call_at_the_same_time(link: tuple[Domain, Channel]) -> None:
    _, channel = link
    answers: dict[int, bytes] = {}

    def call_some(first: int) -> None:
        for number in range(first, first + 20):
            frame = channel.call(number, Act.ECHO, str(number).encode(), (), 0, 0.0, 10.0)
            answers[number] = frame.meta if frame else b""

    threads = [threading.Thread(target=call_some, args=(index * 20,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number).encode() for number in range(60)}


# waiting ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("domain_name", DOMAINS)
def test_poll_returns_none_when_its_time_is_up(domain_name: str) -> None:
    domain = open_domain(domain_name)
    began_s = time.monotonic()
    assert domain.poll(0.05) is None
    assert 0.04 < time.monotonic() - began_s < 1.0
    assert domain.poll(0.0) is None
    domain.close()


@pytest.mark.parametrize("domain_name", DOMAINS)
def test_wake_ends_the_current_sleep_or_the_next(domain_name: str) -> None:
    domain = open_domain(domain_name)
    domain.wake()
    began_s = time.monotonic()
    assert domain.poll(10.0) is None
    timer = threading.Timer(0.05, domain.wake)
    timer.start()
    assert domain.poll(10.0) is None
    assert 0.03 < time.monotonic() - began_s < 2.0
    timer.join()
    domain.close()


@pytest.mark.parametrize("domain_name", DOMAINS)
def test_spinning_without_a_message_is_metered(domain_name: str) -> None:
    domain = open_domain(domain_name)
    domain.poll(0.05)
    assert domain.spin_ns() < 5e6
    domain.poll(0.1, 0.05)
    assert 0.03e9 < domain.spin_ns() < 0.1e9
    domain.close()


def test_what_a_signal_announces_is_there_for_a_poll_that_waits_for_nothing(
    link: tuple[Domain, Channel],
) -> None:
    """An executor polls once for a signal: what that poll misses is missed until the next signal."""
    domain, channel = link
    heard = threading.Event()
    ask(domain, channel, Act.ECHO)
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: heard.set())
    try:
        domain.announce(signal.SIGUSR2)
        for call_id in range(10):
            heard.clear()
            send(domain, channel, Act.URGE, call_id, b"0.002")
            frame = None
            while frame is None and not heard.is_set():
                frame = domain.poll(0.0)
            while frame is None and heard.wait(5.0):
                heard.clear()
                frame = domain.poll(0.0)
            assert frame is not None
            assert frame.call_id == call_id
    finally:
        domain.close()
        signal.signal(signal.SIGUSR2, previous)


def test_an_urgent_frame_is_announced_by_a_signal(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    heard = threading.Event()
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: heard.set())
    ask(domain, channel, Act.ECHO)  # over RDMA both sides must poll before a first frame can leave
    try:
        domain.announce(signal.SIGUSR2)
        send(domain, channel, Act.URGE, 9, b"0.05")
        assert heard.wait(5.0)
        [frame] = receive(domain, 1)
        assert (frame.kind, frame.call_id, frame.meta) == (Kind.CANCEL, 9, b"cancel")
    finally:
        domain.close()
        signal.signal(signal.SIGUSR2, previous)


def test_a_signal_handler_may_poll_while_user_code_runs(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    got = []

    def handle(number: int, _: object) -> None:
        frame = domain.poll(0.0)
        if frame is not None:
            got.append(frame)

    previous = signal.signal(signal.SIGUSR2, handle)
    ask(domain, channel, Act.ECHO)  # over RDMA both sides must poll before a first frame can leave
    try:
        domain.announce(signal.SIGUSR2)
        send(domain, channel, Act.URGE, 9, b"0.05")
        deadline_s = time.monotonic() + 5
        while not got and time.monotonic() < deadline_s:
            sum(range(1000))
        assert [frame.kind for frame in got] == [Kind.CANCEL]
    finally:
        domain.close()
        signal.signal(signal.SIGUSR2, previous)


# native functions -------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("library")
    (directory / "reverse.c").write_text(LIBRARY)
    target = directory / "libreverse.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", target, directory / "reverse.c"], check=True)
    return str(target)


def test_a_native_function_answers_calls(link: tuple[Domain, Channel], library: str) -> None:
    domain, channel = link
    assert ask(domain, channel, Act.DEFINE, f"{library} reverse 65536".encode()).meta == b"defined"
    frame = channel.call(2, 100, b"abc", (), 0, 0.0, 10.0)
    assert frame is not None
    assert (frame.kind, frame.meta, frame.data) == (Kind.RESULT, b"cba", None)
    frame = channel.call(3, 100, b"", (b"12", b"34"), 0, 0.0, 10.0)
    assert frame is not None
    assert frame.meta == b"4321"
    frame = channel.call(4, 100, b"x" * 65537, (), 0, 0.0, 10.0)
    assert frame is not None
    assert frame.kind == Kind.ERROR
    assert "returned error code 7" in str(decode_error(frame.meta, frame.data))


@pytest.mark.parametrize("outer", [0, 1])
def test_a_native_call_leaves_the_running_word_as_it_found_it(
    pair: Pair, tmp_path: Path, library: str, outer: int
) -> None:
    """It may be served by a poll that a signal handler makes while other code runs."""
    row, running = memoryview(bytearray(32)).cast("Q"), memoryview(bytearray(8)).cast("Q")
    with linked(pair, tmp_path) as (client, caller, server, answerer):
        server.define_native(answerer.id, 100, library, "reverse", 8, Meter(row, running))
        running[0] = outer
        for call_id, arguments in ((2, b"abc"), (3, b"too long for it")):
            assert caller.send(Kind.CALL, call_id, 100, arguments)
        kinds = [frame.kind for frame in receive_while_polling(server, client, 2)]
        assert kinds == [Kind.RESULT, Kind.ERROR]
        assert list(row[:2]) == [2, 1]
        assert running[0] == outer


def test_a_missing_native_function_is_named(pair: Pair, peers: Peers, library: str) -> None:
    with connected(pair, peers.kept(pair)) as (domain, channel):
        with pytest.raises(FunctionLoadError, match="forward"):
            domain.define_native(channel.id, 1, library, "forward", 10)
        with pytest.raises(FunctionLoadError, match="no/such/lib"):
            domain.define_native(channel.id, 1, "/no/such/lib.so", "forward", 10)


# the end, in order ------------------------------------------------------------------------------------------
def test_closing_says_goodbye_and_then_the_channel_is_lost(link: tuple[Domain, Channel]) -> None:
    domain, channel = link
    send(domain, channel, Act.BURST, 1, b"100")
    send(domain, channel, Act.CLOSE, 2)
    frames = receive(domain, 103)
    assert [frame.kind for frame in frames] == [Kind.YIELD] * 100 + [Kind.RESULT, Kind.GOODBYE, Kind.LOST]
    assert not channel.alive
    assert domain.poll(0.05) is None


def test_close_is_idempotent_and_ends_everything(pair: Pair, peers: Peers) -> None:
    with connected(pair, peers.kept(pair)) as (domain, channel):
        channel.close()
        channel.close()
        assert not channel.alive
        assert domain.channel(channel.id) is None
        with pytest.raises(PeerLostError):
            channel.send(Kind.CALL, 1, 0, b"")
        with pytest.raises(PeerLostError):
            channel.send_urgent(Kind.CANCEL, 1)
        with pytest.raises(PeerLostError):
            channel.call(1, 0, b"", (), 0, 0.0, 1.0)
        assert domain.poll(0.01) is None
        domain.close()
        domain.close()
        with pytest.raises(FabricError):
            domain.poll(0.0)
        with pytest.raises(FabricError):
            domain.connect("unix:/nowhere", hello())


def test_large_answers_leave_before_close_returns(pair: Pair, peers: Peers) -> None:
    with connected(pair, peers.kept(pair)) as (domain, channel):
        send(domain, channel, Act.GIVE, 1, str(8 * MIB).encode())
        send(domain, channel, Act.CLOSE, 2)
        frames = receive(domain, 3)
        assert [frame.kind for frame in frames] == [Kind.RESULT, Kind.GOODBYE, Kind.LOST]
        assert len(frames[0].data or b"") == 8 * MIB


def test_two_hundred_channels_leak_no_descriptor(pair: Pair, peers: Peers) -> None:
    peer = peers.kept(pair)
    with connected(pair, peer) as (domain, channel):
        theirs = int(ask(domain, channel, Act.DESCRIPTORS).meta)
        ours = descriptor_count()
        channels = [domain.connect(peer.address, hello()) for _ in range(200)]
        for number, each in enumerate(channels):
            send(domain, each, Act.ECHO, number, str(number).encode())
        frames = receive(domain, 200)
        assert sorted(int(frame.meta) for frame in frames) == list(range(200))
        assert {frame.channel_id for frame in frames} == {each.id for each in channels}
        for each in channels:
            each.close()
        assert descriptor_count() <= ours + 2
        deadline_s = time.monotonic() + 10
        while int(ask(domain, channel, Act.DESCRIPTORS).meta) > theirs + 2:
            assert time.monotonic() < deadline_s, "the peer keeps descriptors of closed channels"


def test_large_transfers_leave_no_descriptor_and_no_shared_memory(pair: Pair, peers: Peers) -> None:
    peer = peers.kept(pair)
    with connected(pair, peer) as (domain, channel):  # what a library keeps for ever, it opens now
        ask(domain, channel, Act.ECHO, b"", (bytes(MIB),))
    descriptors, mapped = descriptor_count(), shared_files()
    with connected(pair, peer) as (domain, channel):
        kept = [ask(domain, channel, Act.ECHO, b"", (bytes(MIB),)).data]
        open_descriptors = descriptor_count()
        kept += [ask(domain, channel, Act.ECHO, b"", (bytes(MIB),)).data for _ in range(20)]
        assert descriptor_count() < open_descriptors + 10, "received data must not hold descriptors"
    assert all(len(data or b"") == MIB for data in kept)
    assert descriptor_count() <= descriptors
    assert shared_files() <= mapped
