"""One channel to one executor, as the scheduler's shell uses it.

Invariants: frames leave in the order given; a function's DEFINE precedes its first CALL; what the channel
has no room for waits here, and the window (`dispatch.py`) bounds how much that can be.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from isthmus.fabric.channels import Buffer, Channel
from isthmus.fabric.frames import Kind
from isthmus.sdk.definitions import Definition
from isthmus.sdk.supply import Holding

TRUST_S = 0.0002  # an executor that answered this recently is not asked whether it lives; asking costs 2 us
_CALL = int(Kind.CALL)


class _Waiting(NamedTuple):
    kind: int
    call_id: int
    function_id: int
    meta: Buffer
    data: Sequence[Buffer]
    deadline_ns: int
    credits: int


class Link:
    def __init__(self, channel: Channel, holding: Holding) -> None:
        self.channel = channel
        self.holding = holding
        self.defined: set[int] = set()
        self.open = True  # False: drained, given back or dead; the shortest path must not use it
        self._backlog: deque[_Waiting] = deque()

    @property
    def backlogged(self) -> bool:
        return bool(self._backlog)

    def define(self, definition: Definition) -> None:
        if definition.number not in self.defined:
            if definition.needs is not None:
                self.define(definition.needs)
            self.defined.add(definition.number)
            code = (definition.code,) if definition.code else ()
            self._send(_Waiting(Kind.DEFINE, 0, definition.number, definition.meta, code, 0, 0))

    def call(
        self, number: int, function_id: int, meta: Buffer, data: Sequence[Buffer], deadline_ns: int
    ) -> None:
        """Raises PeerLostError when the executor is gone; its LOST frame follows by `poll`."""
        if not self._backlog and self.channel.send(_CALL, number, function_id, meta, data, deadline_ns):
            return
        self._send(_Waiting(_CALL, number, function_id, meta, data, deadline_ns, 0))

    def grant(self, number: int, function_id: int, items: int) -> None:
        """Let a generator send this many more items."""
        self._send(_Waiting(Kind.YIELD, number, function_id, b"", (), 0, items))

    def interrupt(self, number: int, reason: bytes) -> None:
        self.channel.send_urgent(Kind.CANCEL, number, reason)

    def has_ended(self) -> bool:
        """Whether the executor is gone, even if nothing has told of it yet."""
        return self.channel.has_ended()

    def flush(self) -> None:
        while self._backlog and self._try(self._backlog[0]):
            self._backlog.popleft()

    def _send(self, frame: _Waiting) -> None:
        if self._backlog or not self._try(frame):
            self._backlog.append(frame)

    def _try(self, frame: _Waiting) -> bool:
        return self.channel.send(
            frame.kind,
            frame.call_id,
            frame.function_id,
            frame.meta,
            frame.data,
            frame.deadline_ns,
            0,
            frame.credits,
        )
