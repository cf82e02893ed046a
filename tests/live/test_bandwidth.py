"""Bandwidth is held by the kernel: a lease that asked for little sends little, others as much as ever.

Between two network namespaces, with real traffic. Needs root; skipped with the reason elsewhere.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.sites import clean_environment

REPOSITORY = Path(__file__).parents[2]
HERE, THERE = "10.157.5.1", "10.157.5.2"


class Namespaces:
    """Two network namespaces with a cable between them. Their file systems are this one's, cgroups too."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.near, self.far = f"isthmus-{tag}-a", f"isthmus-{tag}-b"
        self.interface = f"near{tag}"
        self._other_end = f"far{tag}"
        self._started: list[subprocess.Popen[str]] = []

    def make(self) -> None:
        for name in (self.near, self.far):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        cable = ("name", self.interface, "netns", self.near, "type", "veth")
        _ip("link", "add", *cable, "peer", "name", self._other_end, "netns", self.far)
        for name, interface, address in (
            (self.near, self.interface, HERE),
            (self.far, self._other_end, THERE),
        ):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            _ip("-n", name, "link", "set", interface, "up")

    def remove(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def start(self, name: str, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = ["nsenter", f"--net=/run/netns/{name}", *words]
        environ = clean_environment({"PYTHONPATH": os.pathsep.join(sys.path), **environment})
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._started.append(process)
        return process

    def run(self, *words: str) -> str:
        """In the near one."""
        done = self.start(self.near, *words)
        said, complaint = done.communicate(timeout=60)
        assert done.returncode == 0, complaint
        return said


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    missing = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    made = Namespaces()
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces are refused here: {error.stderr.strip()}")
    yield made
    made.remove()


PROBE = """
import sys
from isthmus.node.isolation import Rlimits, Shaped
print(Shaped(Rlimits("probe"), sys.argv[1], "probe").probe())
"""


def shaping_works(namespaces: Namespaces, interface: str) -> str:
    """ "" or why not."""
    return namespaces.run(sys.executable, "-c", PROBE, interface).strip()


def test_a_capped_lease_sends_little_while_another_sends_much(namespaces: Namespaces, tmp_path: Path) -> None:
    reason = shaping_works(namespaces, namespaces.interface)
    if reason:
        pytest.skip(reason)
    peer = (sys.executable, "-m", "tests.live.bandwidth_peer")
    receiver = namespaces.start(namespaces.far, *peer, "receive", THERE)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "ready\n"
    sender = namespaces.start(
        namespaces.near, *peer, "send", THERE,
        ISTHMUS_NODE__BANDWIDTH="1Gbit/s", ISTHMUS_NODE__INTERFACE=namespaces.interface,
        ISTHMUS_NODE__CORES="2", XDG_STATE_HOME=str(tmp_path),
    )  # fmt: skip
    said, complaint = sender.communicate(timeout=120)
    assert sender.returncode == 0, complaint
    received = json.loads(receiver.communicate(timeout=60)[0])
    assert received["free"] == 32 * 2**20
    assert 0 < received["capped"] < received["free"] / 4
    told = json.loads(said)
    assert told["held"] == {"bandwidth": "tc-htb"}
    assert f"bandwidth is what leaves by {namespaces.interface}" in told["words"]
    assert told["unasked"] == {}
    assert " htb " not in namespaces.run("tc", "qdisc", "show", "dev", namespaces.interface)


def test_an_interface_that_somebody_else_shapes_is_left_alone(namespaces: Namespaces) -> None:
    if shaping_works(namespaces, namespaces.interface):
        pytest.skip("shaping does not work here")
    theirs = ("root", "handle", "7:", "tbf", "rate", "1mbit", "burst", "10k", "latency", "10ms")
    namespaces.run("tc", "qdisc", "add", "dev", namespaces.interface, *theirs)
    assert "a root queue of somebody else (tbf 7:)" in shaping_works(namespaces, namespaces.interface)
    assert "tbf 7:" in namespaces.run("tc", "qdisc", "show", "dev", namespaces.interface)
    assert "there is no interface 'none'" in shaping_works(namespaces, "none")


RESTART = """
import os, subprocess, sys
from isthmus.core.ids import LeaseId
from isthmus.node.isolation import Rlimits, Shaped, Share
def agent():
    one = Shaped(Rlimits("again"), sys.argv[1], "again")
    assert one.probe() == "", one.probe()
    return one
def classes():
    return subprocess.run(["tc", "class", "show", "dev", sys.argv[1]], capture_output=True, text=True).stdout
share = Share((0,), 2**28, amounts=(("bandwidth", 8_000_000),))
first = agent()
for name in ("ls_kept", "ls_gone"):
    first.create(LeaseId(name), share)
second = agent()  # as after a kill: nothing was destroyed
assert second.remains() == ["ls_gone", "ls_kept"], second.remains()
second.create(LeaseId("ls_kept"), share)
assert classes().count("rate 8Mbit") == 2, classes()
second.destroy(LeaseId("ls_gone"))
assert classes().count("rate 8Mbit") == 1, classes()
second.destroy(LeaseId("ls_kept"))
assert classes() == "" and second.remains() == []
"""


def test_an_agent_that_comes_back_finds_and_ends_what_was_shaped(namespaces: Namespaces) -> None:
    reason = shaping_works(namespaces, namespaces.interface)
    if reason:
        pytest.skip(reason)
    namespaces.run(sys.executable, "-c", RESTART, namespaces.interface)


TOGETHER = """
import subprocess, sys, threading
from isthmus.core.ids import LeaseId
from isthmus.node.isolation import Rlimits, Shaped, Share
share = Share((0,), 2**28, amounts=(("bandwidth", 8_000_000),))
def filters():
    command = ["tc", "filter", "show", "dev", sys.argv[1], "parent", "1575:"]
    return subprocess.run(command, capture_output=True, text=True).stdout
def work(tag, agent):
    try:
        for _ in range(25):
            agent.create(LeaseId("ls_a"), share)
            if f"isthmus-{tag}-ls_a" not in filters():
                failed.append("not shaped")
            agent.destroy(LeaseId("ls_a"))
    except Exception as error:
        failed.append(repr(error))
failed = []
agents = {tag: Shaped(Rlimits(tag), sys.argv[1], tag) for tag in ("one", "two")}
for agent in agents.values():
    assert agent.probe() == ""
threads = [threading.Thread(target=work, args=item) for item in agents.items()]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for agent in agents.values():
    agent.destroy(LeaseId("ls_a"))
assert not failed, failed
"""


def test_agents_of_one_interface_do_not_undo_each_others_shaping(namespaces: Namespaces) -> None:
    reason = shaping_works(namespaces, namespaces.interface)
    if reason:
        pytest.skip(reason)
    namespaces.run(sys.executable, "-c", TOGETHER, namespaces.interface)
    assert " htb " not in namespaces.run("tc", "qdisc", "show", "dev", namespaces.interface)


HELD = """
import fcntl, sys
from isthmus.node.isolation import Rlimits, Shaped, shaping
shaping.TURN_S = 0.05
with open("/proc/self/ns/net") as theirs:
    fcntl.flock(theirs, fcntl.LOCK_EX)
    assert Shaped(Rlimits("held"), sys.argv[1], "held").probe() == ""
"""


def test_a_stranger_who_holds_the_lock_stops_no_shaping(namespaces: Namespaces) -> None:
    reason = shaping_works(namespaces, namespaces.interface)
    if reason:
        pytest.skip(reason)
    namespaces.run(sys.executable, "-c", HELD, namespaces.interface)
