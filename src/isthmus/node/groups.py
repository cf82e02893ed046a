"""Groups on an executor: the context that a group's function gets, and the fabric as it sees it.

A member's code sends and receives on the executor's own domain, in the middle of a call. So what arrives
there and is not for the group goes to the server as ever: a CANCEL, or the end of the client, stops a blocked
`recv` too.
Invariant: while the group drives the domain, the signal handler does not.
Not here: ranks, collectives and their messages (`isthmus.fabric.collectives`).
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from isthmus.core.errors import InvalidRequestError
from isthmus.fabric.channels import Admission, Buffer, Channel, Domain, Frame
from isthmus.fabric.codec import GroupTable
from isthmus.fabric.collectives import Group
from isthmus.fabric.frames import Hello, Kind, Welcome

P = ParamSpec("P")
R = TypeVar("R")


class Switchboard:
    """Sorts what arrives on the executor's domain while a group drives it."""

    def __init__(self, domain: Domain, receive: Callable[[Frame], None], heed: Callable[[], None]) -> None:
        """receive: the server's way with any other frame; heed: raises CallInterrupted if the call must
        stop.
        """
        self.domain = domain
        self.shielding = False  # a signal must only leave a note now
        self._receive = receive
        self._heed = heed
        self._frames: deque[Frame] = deque()
        self._channels: set[int] = set()

    def offer(self, frame: Frame) -> bool:
        """Take a frame if it is for groups: a member's message, or the loss of a member."""
        if frame.kind == Kind.PEER:
            self._channels.add(frame.channel_id)
        elif frame.kind != Kind.LOST or frame.channel_id not in self._channels:
            return False
        self._frames.append(frame)
        return True

    def shielded(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Do fabric work that no signal handler may interrupt half-way."""
        self.shielding = True
        try:
            result = work(*args, **kwargs)
        finally:
            self.shielding = False
        self._heed()
        return result

    def connect(self, address: str, hello: Hello, timeout_s: float) -> Channel:
        channel = self.shielded(self.domain.connect, address, hello, timeout_s)
        self._channels.add(channel.id)
        return GroupChannel(channel, self)

    def next_frame(self, timeout_s: float, spin_s: float) -> Frame | None:
        """The next frame for groups; None after timeout_s, or earlier."""
        if not self._frames:
            frame = self.shielded(self.domain.poll, timeout_s, spin_s)
            if frame is not None and not self.offer(frame):
                self._receive(frame)
                self._heed()
        return self._frames.popleft() if self._frames else None

    def close(self) -> None:
        """Forget the members' channels; those that this side opened are closed by their groups."""
        self._frames.clear()
        self._channels.clear()


class GroupDomain:
    """The executor's domain, to a group: `poll` gives frames of other members only."""

    def __init__(self, board: Switchboard) -> None:
        self._domain = board.domain
        self._board = board

    @property
    def name(self) -> str:
        return self._domain.name

    def connect(self, address: str, hello: Hello, timeout_s: float = 5.0) -> Channel:
        return self._board.connect(address, hello, timeout_s)

    def poll(self, timeout_s: float, spin_s: float = 0.0) -> Frame | None:
        return self._board.next_frame(timeout_s, spin_s)

    def channel(self, channel_id: int) -> Channel | None:
        channel = self._domain.channel(channel_id)
        return None if channel is None else GroupChannel(channel, self._board)

    def wake(self) -> None:
        self._domain.wake()

    def spin_ns(self) -> int:
        return self._domain.spin_ns()

    def listen(self, address: str, admit: Admission) -> str:
        raise NotImplementedError("a group listens where its executor does")

    def define_native(self, *_: Any) -> None:
        raise NotImplementedError("native functions are defined by clients")

    def announce(self, signal_number: int) -> None:
        raise NotImplementedError("the executor has announced itself")

    def close(self) -> None:
        """The domain is the executor's: it stays open."""


class GroupChannel:
    """A channel whose sends no signal handler can interrupt half-way."""

    def __init__(self, channel: Channel, board: Switchboard) -> None:
        self._channel = channel
        self._board = board

    @property
    def id(self) -> int:
        return self._channel.id

    @property
    def peer(self) -> Hello | Welcome:
        return self._channel.peer

    @property
    def transport(self) -> str:
        return self._channel.transport

    @property
    def alive(self) -> bool:
        return self._channel.alive

    @property
    def unsent(self) -> bool:
        return self._channel.unsent

    def has_ended(self) -> bool:
        return self._channel.has_ended()

    def send(
        self, kind: int, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer] = (),
        deadline_ns: int = 0, flags: int = 0, credits: int = 0,
    ) -> bool:  # fmt: skip
        return self._board.shielded(
            self._channel.send, kind, call_id, function_id, meta, data, deadline_ns, flags, credits
        )

    def call(
        self, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer], deadline_ns: int,
        spin_s: float, timeout_s: float,
    ) -> Frame | None:  # fmt: skip
        raise NotImplementedError("members of a group send to each other; they do not call")

    def send_urgent(self, kind: int, call_id: int, meta: bytes = b"") -> None:
        self._board.shielded(self._channel.send_urgent, kind, call_id, meta)

    def close(self) -> None:
        self._board.shielded(self._channel.close)


class Contexts:
    """One client's groups by table index; each context is made at the first call that needs it."""

    def __init__(self, board: Switchboard) -> None:
        self._board = board
        self._tables: dict[int, GroupTable] = {}
        self._made: dict[int, Group] = {}

    def define(self, index: int, table: GroupTable) -> None:
        self._tables[index] = table

    def get(self, index: int) -> Group:
        """Connects to the other members. Raises InvalidRequestError, and what connecting raises."""
        if index not in self._made:
            if index not in self._tables:
                raise InvalidRequestError(f"no group {index} was defined on this channel")
            self._made[index] = Group(GroupDomain(self._board), self._tables[index])
        return self._made[index]

    def close(self) -> None:
        for group in self._made.values():
            group.close()
        self._made.clear()
