"""Floors that need no package of ours: a memcpy, and a blocking ping-pong over a Unix socket.

The raw UCX floors are native (`benchmarks/floors`).
"""

import os
import socket

import numpy as np

from benchmarks.harness.subject import PAYLOAD_BYTES, Cells, pin_pair, run

ASLEEP_S = 0.01  # long enough for the peer to sleep and its core to idle
_CLOSE = b"\0"


def measure(cells: Cells) -> None:
    measure_memcpy(cells)
    measure_socket(cells)


def measure_memcpy(cells: Cells) -> None:
    """One copy of 1 MiB between two buffers that both have been touched."""
    source = np.ones(PAYLOAD_BYTES, dtype=np.uint8)
    target = np.zeros(PAYLOAD_BYTES, dtype=np.uint8)
    cells.latency("memcpy_1mib_us", np.copyto, target, source)


def measure_socket(cells: Cells) -> None:
    """1 B there and 1 B back, both sides blocked in recv: back to back, and with both asleep before each."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    child = os.fork()
    if child == 0:
        ours.close()
        _echo(theirs)
        os._exit(0)
    theirs.close()
    cells.notes.append(pin_pair({child}))
    try:
        cells.latency("socket_round_trip_us", _round_trip, ours)
        cells.latency_asleep("socket_asleep_round_trip_us", ASLEEP_S, _round_trip, ours)
        ours.send(_CLOSE)
    finally:
        ours.close()
        os.waitpid(child, 0)


def _round_trip(connection: socket.socket) -> None:
    connection.send(b"x")
    connection.recv(1)


def _echo(connection: socket.socket) -> None:
    while (byte := connection.recv(1)) and byte != _CLOSE:
        connection.send(byte)


if __name__ == "__main__":
    run("floors", measure)
