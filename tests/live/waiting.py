"""Waiting for what others do in their own time, and ports for them."""

import contextlib
import random
import socket
import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """For effects in other processes, which tell nobody when they happen."""
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, "it did not happen in time"
        time.sleep(0.05)


def free_ports(count: int) -> int:
    """The first of so many ports that nobody listens at."""
    while True:
        first = random.randrange(20000, 32000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
