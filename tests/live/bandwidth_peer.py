"""The two ends of the test of bandwidth, each run in a network namespace of its own.

    python -m tests.live.bandwidth_peer receive ADDRESS     counts what comes, until `free` has sent all
    python -m tests.live.bandwidth_peer send ADDRESS        a site, and two functions that send there

Both print one line of JSON.
"""

import contextlib
import json
import socket
import sys
import threading

import isthmus

PORT = 7000
FREE_BYTES = 32 * 2**20
CHUNK = bytes(64 * 2**10)
NAME_BYTES = 8


def send(name: str, address: str, limit_bytes: int) -> None:
    """As much as the connection takes, until the limit or until the other side has enough."""
    with socket.create_connection((address, PORT)) as line, contextlib.suppress(ConnectionError):
        line.sendall(name.encode().ljust(NAME_BYTES))
        while limit_bytes > 0:
            line.sendall(CHUNK)
            limit_bytes -= len(CHUNK)


@isthmus.function(isthmus.Resources(memory="256MiB", bandwidth="800kbit/s"))
def send_capped(address: str) -> None:
    send("capped", address, 2**40)


@isthmus.function(isthmus.Resources(memory="256MiB"))
def send_free(address: str) -> None:
    send("free", address, FREE_BYTES)


class Receiver:
    """`free` is read from when something of `capped` has come, so that both send at the same time."""

    def __init__(self) -> None:
        self.received = {"capped": 0, "free": 0}
        self.is_capped_there = threading.Event()
        self.told: dict[str, int] = {}
        self.is_over = threading.Event()

    def read(self, line: socket.socket) -> None:
        name = line.recv(NAME_BYTES, socket.MSG_WAITALL).decode().strip()
        if name == "free":
            self.is_capped_there.wait()
        with contextlib.suppress(OSError):
            while chunk := line.recv(2**20):
                self.received[name] += len(chunk)
                if name == "capped":
                    self.is_capped_there.set()
        if name == "free":
            self.told = dict(self.received)
            self.is_over.set()

    def run(self, address: str) -> dict[str, int]:
        with socket.create_server((address, PORT)) as server:
            print("ready", flush=True)
            lines = [server.accept()[0] for _ in range(2)]
        readers = [threading.Thread(target=self.read, args=(line,), daemon=True) for line in lines]
        for reader in readers:
            reader.start()
        self.is_over.wait()
        for line in lines:
            line.close()
        return self.told


def drive(address: str) -> dict[str, object]:
    with isthmus.connect() as site:
        calls = [site.submit(send_capped, address), site.submit(send_free, address)]
        calls[1].result(timeout_s=90)
        held = {lease.resources.amounts.get("bandwidth", 0): lease.enforcement for lease in site.leases()}
        calls[0].result(timeout_s=90)
    return {
        "held": held[800_000].amounts,
        "words": held[800_000].detail,
        "unasked": held[0].amounts,
    }


if __name__ == "__main__":
    role, address = sys.argv[1:]
    print(json.dumps(drive(address) if role == "send" else Receiver().run(address)), flush=True)
