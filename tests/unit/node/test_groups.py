"""What a group sees of its executor's domain, and what it must leave to the server."""

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.core.errors import InvalidRequestError
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.frames import Hello, Kind, Welcome
from isthmus.fabric.sockets import SocketDomain
from isthmus.node.groups import Contexts, GroupDomain, Switchboard
from isthmus.node.interruption import CallInterrupted

HELLO = Hello(token="t", python=python_version(), isthmus=ISTHMUS_VERSION, role="peer", rank=1)


def _admit(hello: Hello) -> Welcome:
    return Welcome(
        executor="e",
        python=python_version(),
        isthmus=ISTHMUS_VERSION,
        channel_id=0,
        channel_key=0,
        credits=16,
    )


@pytest.fixture
def ends() -> Iterator[tuple[Domain, Domain, str]]:
    """The executor's domain, another member's, and where the first listens."""
    here, there = SocketDomain(), SocketDomain()
    address = here.listen(f"unix:/tmp/isthmus-{secrets.token_hex(6)}.sock", _admit)
    yield here, there, address
    there.close()
    here.close()
    Path(address.removeprefix("unix:")).unlink(missing_ok=True)


class Server:
    """Keeps what the group hands over; stops the call when told to."""

    def __init__(self) -> None:
        self.received: list[Frame] = []
        self.stop = False

    def heed(self) -> None:
        if self.stop:
            raise CallInterrupted("cancel")


def _connect(here: Domain, there: Domain, address: str) -> Channel:
    opened: list[Channel] = []
    dialler = threading.Thread(target=lambda: opened.append(there.connect(address, HELLO)))
    dialler.start()
    while dialler.is_alive():
        here.poll(0.01)
    dialler.join()
    return opened[0]


def test_a_group_gets_messages_of_members_and_the_server_gets_the_rest(
    ends: tuple[Domain, Domain, str],
) -> None:
    here, there, address = ends
    server = Server()
    group = GroupDomain(Switchboard(here, server.received.append, server.heed))
    channel = _connect(here, there, address)
    channel.send(Kind.CALL, 1, 0, b"call")
    channel.send(Kind.PEER, 2, 7, b"message")
    frames = [frame for _ in range(20) if (frame := group.poll(0.05)) is not None]
    assert [(frame.kind, frame.function_id, bytes(frame.meta)) for frame in frames] == [
        (Kind.PEER, 7, b"message")
    ]
    assert [(frame.kind, frame.call_id) for frame in server.received] == [(Kind.CALL, 1)]


def test_a_member_that_is_lost_is_told_to_the_group(ends: tuple[Domain, Domain, str]) -> None:
    here, there, address = ends
    server = Server()
    group = GroupDomain(Switchboard(here, server.received.append, server.heed))
    _connect(here, there, address).send(Kind.PEER, 1, 0, b"last words")
    first = _next(group)
    there.close()
    kinds = {_next(group).kind}
    assert first.kind == Kind.PEER
    assert Kind.LOST in kinds


def test_a_blocked_receive_is_interrupted(ends: tuple[Domain, Domain, str]) -> None:
    here, there, address = ends
    server = Server()
    group = GroupDomain(Switchboard(here, server.received.append, server.heed))
    _connect(here, there, address)
    server.stop = True
    with pytest.raises(CallInterrupted):
        group.poll(0.0)


def test_messages_that_come_before_the_group_asks_are_kept(ends: tuple[Domain, Domain, str]) -> None:
    here, there, address = ends
    board = Switchboard(here, lambda frame: None, lambda: None)
    _connect(here, there, address).send(Kind.PEER, 1, 0, b"early")
    while (frame := here.poll(0.05)) is None:
        pass
    assert board.offer(frame)
    early = GroupDomain(board).poll(0.0)
    assert early is not None
    assert bytes(early.meta) == b"early"


def test_a_function_of_an_undefined_group_says_so(ends: tuple[Domain, Domain, str]) -> None:
    contexts = Contexts(Switchboard(ends[0], lambda frame: None, lambda: None))
    with pytest.raises(InvalidRequestError, match="no group 3"):
        contexts.get(3)
    contexts.close()


def _next(group: GroupDomain) -> Frame:
    while (frame := group.poll(0.05)) is None:
        pass
    return frame
