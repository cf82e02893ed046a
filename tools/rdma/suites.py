"""Run the suites that need RDMA or the guest: in the guest (`guest`), or where a real device is (`machine`).

The guest runs two at a time, one on each of its cores, each with an RDMA device of its own: a device's packet
counter then tells of one suite alone.
Not here: what the guest is (`guest.py`, `init.sh`).
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TOOLS = Path(__file__).resolve().parent
REPOSITORY = TOOLS.parents[1]


class Suite(NamedTuple):
    """`arguments` of pytest, what the guest adds to the environment, and the command that starts it there."""

    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    before: tuple[str, ...] = ()


CHANNEL_FILES = ("channels", "channels_death", "channels_handshake")
CHANNELS = Suite(
    "channels",
    (
        *(f"tests/conformance/test_{name}.py" for name in CHANNEL_FILES),
        "-k",
        "ucx-rdma or (handshake and ucx and not sockets and not wire)",
    ),
    {
        "UCX_NET_DEVICES": "rxe0:1",
        "ISTHMUS_TEST_PEER_HOST": "198.51.100.2",
        "ISTHMUS_TEST_PEER_COMMAND": "nsenter --net=/run/netns/peer",
        "ISTHMUS_TEST_NOTICED_S": "5",
    },
)
"""The conformance suite of channels; in the guest the peer is in another network."""
CALLS = ("tests/rdma",)
LIMITS = "tests/live/test_isolation.py"
LEASES = Suite(
    "leases",
    (
        *CALLS,
        LIMITS,
        "tests/live/test_node_faults.py",
        "-k",
        "rdma or cgroup-v2 or memory_beyond_the_lease_kills",
    ),
    {"UCX_NET_DEVICES": "rxe1:1", "ISTHMUS_TEST_REQUIRES": "cgroup-v2"},
)  # fmt: skip
"""Calls by RDMA, and what holds a lease's real processes in cgroup version 2, which the guest has."""
SESSION = Suite(
    "session", (LIMITS, "-k", "systemd"), {"ISTHMUS_TEST_REQUIRES": "systemd"}, (str(TOOLS / "session.sh"),)
)
"""The same limits for a plain user, in a scope of his own systemd."""
LEAN = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_timeout,pytest_randomly"}
"""Importing the plugins that these suites do not use takes an emulated processor long."""


def main(place: str) -> int:
    if place == "machine":
        return max(_run(Suite(CHANNELS.name, CHANNELS.arguments, {})), _run(Suite("calls", CALLS, {})))
    with ThreadPoolExecutor() as cores:
        channels = cores.submit(_run, CHANNELS)
        others = cores.submit(lambda: max(_run(LEASES), _run(SESSION)))
        return max(channels.result(), others.result())


def _run(suite: Suite) -> int:
    """Run to the end, each line of output under the suite's name; 0, or 1 when anything failed."""
    command = [
        *suite.before, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-vv", "--color=no",
        "--durations=8", "--timeout=300", *suite.arguments,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, **LEAN, **suite.environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as output:
        for line in output:
            print(f"{suite.name}: {line}", end="", flush=True)
    return int(process.wait() != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
