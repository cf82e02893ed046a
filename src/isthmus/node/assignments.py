"""What agent, zygote and unassigned executor say to each other over Unix SOCK_SEQPACKET pairs.

    agent  -> zygote     Fork                      one more executor, unassigned
    zygote -> agent      Started | Broken          once, after its imports
    zygote -> agent      Forked (+ 1 descriptor)   the agent's end of the new executor's own pair
    zygote -> agent      Exited                    a child's exit status, when reaped
    agent  -> executor   Assignment                now you belong to this lease
    executor -> agent    Ready | Broken            it listens; then both close the pair

A message is one packet: a msgpack-encoded tagged struct. An end of file means the other process died: a
zygote and an unassigned executor then end too, an assigned executor goes on.
"""

import socket

import msgspec

from isthmus.core.ids import ExecutorId, LeaseId, NodeId, TenantId

PACKET_BYTES_MAX = 65536


class Packet(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


class Preparation(Packet, frozen=True):
    """The zygote's only argument: what it imports before the first fork, and the fabric of its children."""

    sys_path: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    fabric: str = "auto"


class Started(Packet, frozen=True):
    """The zygote can fork."""

    python: str
    codec_version: int


class Broken(Packet, frozen=True):
    """It cannot; `code` is a class name in core.errors."""

    code: str
    message: str


class Fork(Packet, frozen=True):
    pass


class Forked(Packet, frozen=True):
    pid: int


class Exited(Packet, frozen=True):
    """`status` as `os.waitstatus_to_exitcode` gives it: >= 0 an exit code, < 0 minus the signal."""

    pid: int
    status: int
    cpu_ns: int


class Assignment(Packet, frozen=True):
    """Everything an executor must know of its lease.

    page, log     paths; the agent made the page and set its deadline before
    listen        the address to accept clients at
    site          URL for nested calls
    sys_path      the caller's import directories, before the interpreter's own or after them
    cache         path of a directory of the lease's own, if it holds cache
    ahead_s       how far the site's clock is ahead of this node's; tokens carry the site's times
    is_harvested  it ends with its zygote, and so with the agent, who alone keeps it off its owner's cores
    """

    executor: ExecutorId
    lease: LeaseId
    tenant: TenantId
    node: NodeId
    lease_key: bytes
    page: str
    log: str
    listen: str
    site: str
    sys_path: tuple[str, ...]
    sys_path_first: bool
    cores: int
    spin_s: float
    ahead_s: float = 0.0
    is_harvested: bool = False
    cache: str = ""


class Ready(Packet, frozen=True):
    address: str


_DECODER = msgspec.msgpack.Decoder(
    Preparation | Started | Broken | Fork | Forked | Exited | Assignment | Ready
)


def pack(packet: Packet) -> bytes:
    return msgspec.msgpack.encode(packet)


def unpack(data: bytes) -> Packet:
    """Raises msgspec.MsgspecError for anything that is no packet."""
    try:
        packet: Packet = _DECODER.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"text that is not UTF-8, or nested too deep: {error}") from error
    return packet


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
