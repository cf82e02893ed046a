"""The one seam of the data plane: a Domain owns channels and is polled; a Channel sends to one peer.

Two implementations pass one conformance suite: `ucx.UcxDomain` (native) and `sockets.SocketDomain` (plain
Python).

Every channel begins with a bootstrap socket (Unix or TCP) that carries the handshake (`frames`). It stays
open for the channel's life: its end of file is the death certificate of the peer (noticed in milliseconds
whatever the transport), and urgent frames (CANCEL) travel on it, so that a signal can announce them while a
function runs.

Threads: `poll`, `call`, `connect` and `close` of a domain hold its lock; one thread at a time drives
progress. `Channel.send` may be called from any thread. `wake` may be called from any thread or signal
handler.
Fork: a domain is unusable in a forked child (every method raises FabricError) and leaves its parent's alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from isthmus.fabric.frames import Hello, Refusal, Welcome

Buffer = bytes | bytearray | memoryview


class Frame(NamedTuple):
    """One received message. `data` owns its memory: it stays valid for as long as the view lives."""

    channel_id: int  # our own number for the channel it came by
    kind: int
    call_id: int
    function_id: int
    flags: int
    deadline_ns: int
    credits: int
    meta: bytes
    data: memoryview | None


class Meter(NamedTuple):
    """Where the calls of a native function are counted: memory of 8-byte words that outlives its channel.

    row      4 words: calls, errors, ns busy (estimated for short functions), monotonic ns of the last
    running  1 word, not 0 while the function runs
    """

    row: memoryview
    running: memoryview


class Channel(Protocol):
    @property
    def id(self) -> int: ...

    @property
    def peer(self) -> Hello | Welcome:
        """What the other side said in the handshake."""
        ...

    @property
    def transport(self) -> str:
        """For people: `ucx:posix/memory,cma`, `ucx:rc_verbs/rxe0:1`, `sockets:unix+memfd`, `sockets:tcp`."""
        ...

    @property
    def alive(self) -> bool: ...

    @property
    def unsent(self) -> bool:
        """Whether something that was sent has not left yet: it would be lost with this process."""
        ...

    def has_ended(self) -> bool:
        """Whether the peer is gone, even if no `poll` has told of it yet. One system call."""
        ...

    def send(
        self, kind: int, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer] = (),
        deadline_ns: int = 0, flags: int = 0, credits: int = 0,
    ) -> bool:  # fmt: skip
        """Queue one frame. False: no room now (poll, then try again); nothing was sent.

        The buffers in `data` are not copied if they are large: they must not change until the peer has
        answered, and they are kept alive until then. Raises PeerLostError when the channel is dead.
        """
        ...

    def call(self, call_id: int, function_id: int, meta: Buffer, data: Sequence[Buffer], deadline_ns: int,
             spin_s: float, timeout_s: float) -> Frame | None:  # fmt: skip
        """The hot path: send a CALL and drive progress until the frame that answers call_id arrives.

        Spins for spin_s, then sleeps. Frames for others are kept for the next `poll`. None: timeout_s passed.
        Raises PeerLostError.
        """
        ...

    def send_urgent(self, kind: int, call_id: int, meta: bytes = b"") -> None:
        """A small frame on the bootstrap socket, past whatever is queued; never blocks for long."""
        ...

    def close(self) -> None:
        """Say GOODBYE if possible and free everything. Idempotent."""
        ...


Admission = Callable[[Hello], Welcome | Refusal]


class Domain(Protocol):
    @property
    def name(self) -> str:
        """`ucx` or `sockets`."""
        ...

    def listen(self, address: str, admit: Admission) -> str:
        """Accept channels at `unix:PATH` or `tcp://HOST:PORT` (port 0: any); gives the real address.

        `admit` decides from the Hello; the domain fills in the channel and transport fields of its Welcome.
        It is called during `poll`. A stranger's bytes end in a closed socket and a count, never in an
        exception.
        """
        ...

    def connect(self, address: str, hello: Hello, timeout_s: float = 5.0) -> Channel:
        """Handshake as the calling side; fills in hello's channel, host and transport fields.

        Raises HandshakeError or TokenError (refused; the peer's words), PeerLostError (nobody there, or
        timeout).
        """
        ...

    def poll(self, timeout_s: float, spin_s: float = 0.0) -> Frame | None:
        """The next received frame of any channel, or None after timeout_s (or a `wake`).

        Spins for up to spin_s, then sleeps on file descriptors. A channel's death arrives as Kind.LOST, once,
        after every frame that arrived before it; a new accepted channel just starts to deliver frames.
        """
        ...

    def channel(self, channel_id: int) -> Channel | None: ...

    def wake(self) -> None:
        """Make the current or next `poll`/`call` sleep return early."""
        ...

    def define_native(
        self, channel_id: int, function_id: int, library: str, symbol: str, result_bytes_max: int,
        meter: Meter | None = None,
    ) -> None:  # fmt: skip
        """Answer CALLs of this function with a C symbol, without Python where the domain is native.

        int32_t symbol(const void *arguments, uint64_t arguments_bytes, void *result, uint64_t *result_bytes)
        `*result_bytes` holds the capacity on entry and the length on return; a non-zero return is an error
        code.
        Arguments and result are raw bytes: a CALL's `meta` if it has no `data`, else its `data`; the RESULT's
        `meta`.
        Raises FunctionLoadError when library or symbol is missing.
        """
        ...

    def announce(self, signal_number: int) -> None:
        """From now on raise this signal here when a bootstrap socket becomes readable (O_ASYNC)."""
        ...

    def spin_ns(self) -> int:
        """Nanoseconds spent spinning without a message so far; the meter bills them apart."""
        ...

    def close(self) -> None: ...
