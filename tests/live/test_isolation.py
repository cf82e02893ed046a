"""The mechanisms of this machine, on real processes: whatever it claims to enforce is enforced."""

import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from isthmus.core.ids import LeaseId
from isthmus.node.isolation import CgroupV1, CgroupV2, Isolation, Rlimits, Share, SystemdScope, reserve_name
from isthmus.node.isolation.isolation import PIDS_MAX
from isthmus.node.processes import is_alive, start_ticks

pytestmark = pytest.mark.live
LEASE = LeaseId("ls_live")
MIB = 2**20
REQUIRED = os.environ.get("ISTHMUS_TEST_REQUIRES", "").split(",")  # mechanisms that must work here
KINDS = [CgroupV2, CgroupV1, Rlimits]
if "systemd" in REQUIRED:  # only there: it moves this very process
    KINDS.append(SystemdScope)
FORKS = 600  # more than PIDS_MAX
_EAT = "data = bytearray(b'x') * (512 * 2**20); print(len(data))"
_SHOW_CORES = """
from pathlib import Path
quota = Path("/sys/fs/cgroup" + Path("/proc/self/cgroup").read_text().split("::")[-1].strip(), "cpu.max")
limited = quota.exists() and not quota.read_text().startswith("max")
print(quota.read_text().strip() if limited else os.sched_getaffinity(0))
"""
_BOMB = f"""
forked = []
try:
    while len(forked) < {FORKS}:
        forked.append(os.fork())
        if not forked[-1]:
            time.sleep(600)
except OSError:
    pass
for pid in forked:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
print(len(forked))
"""
_AGENT = """
import sys
from isthmus.core.ids import LeaseId
from isthmus.node import isolation
kind, tag, pid = sys.argv[1:]
mine = getattr(isolation, kind)(tag)
assert mine.probe() == ""
mine.create(LeaseId("ls_live"), isolation.Share((0,), 2**28))
mine.attach(LeaseId("ls_live"), int(pid))
"""


@pytest.fixture(params=KINDS, ids=lambda kind: kind.mechanism)
def isolation(request: pytest.FixtureRequest) -> Iterator[Isolation]:
    isolation: Isolation = request.param(f"t{secrets.token_hex(4)}")
    reason = isolation.probe()
    if reason:
        (pytest.fail if isolation.mechanism in REQUIRED else pytest.skip)(reason)
    yield isolation
    isolation.destroy(LEASE)
    assert isolation.remains() == []


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def _start(children: list[subprocess.Popen[str]], code: str) -> subprocess.Popen[str]:
    """A process, as a session of its own, that runs `code` once its input is closed."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import os, time; input(); {code}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    )  # fmt: skip
    children.append(child)
    return child


def _go(child: subprocess.Popen[str]) -> tuple[str, int]:
    said, _ = child.communicate("\n", timeout=30)
    return said, child.returncode


def test_a_probe_leaves_nothing_behind(isolation: Isolation) -> None:
    assert isolation.probe() == ""
    assert isolation.remains() == []


def test_an_attached_process_runs_on_the_lease_s_cores(isolation: Isolation, children: list) -> None:
    core = max(os.sched_getaffinity(0))
    isolation.create(LEASE, Share((core,), 256 * MIB))
    child = _start(children, _SHOW_CORES)
    isolation.attach(LEASE, child.pid)
    isolation.attach(LEASE, child.pid)
    assert _go(child) == (_cores_shown(isolation, core), 0)


def _cores_shown(isolation: Isolation, core: int) -> str:
    """What a process under a lease of this core says of it."""
    return "100000 100000\n" if isolation.enforcement.cores == "cpu-quota" else f"{{{core}}}\n"


def test_a_fork_bomb_stays_inside_its_lease(isolation: Isolation, children: list) -> None:
    isolation.create(LEASE, Share((0,), 512 * MIB))
    child = _start(children, _BOMB)
    isolation.attach(LEASE, child.pid)
    said, _ = _go(child)
    assert int(said) == (FORKS if isolation.mechanism == "none" else PIDS_MAX - 1)


def test_a_frozen_lease_stands_still_and_goes_on_when_thawed(isolation: Isolation, children: list) -> None:
    isolation.create(LEASE, Share(tuple(os.sched_getaffinity(0)), 256 * MIB, idle_cores=1))
    child = _start(children, "print('on', flush=True)")
    isolation.attach(LEASE, child.pid)
    isolation.freeze(LEASE)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    assert select.select([child.stdout], [], [], 0.5)[0] == []
    isolation.thaw(LEASE)
    assert child.stdout.readline() == "on\n"
    isolation.freeze(LEASE)  # and what is frozen can be ended


def test_memory_beyond_the_lease_is_not_to_be_had(isolation: Isolation, children: list) -> None:
    isolation.create(LEASE, Share((0,), 128 * MIB))
    child = _start(children, _EAT)
    isolation.attach(LEASE, child.pid)
    said, status = _go(child)
    assert said == ""
    if isolation.enforcement.memory == "cgroup":
        assert (status, isolation.oom_kills(LEASE)) == (-signal.SIGKILL, 1)
    else:
        assert (status, isolation.oom_kills(LEASE)) == (1, 0)


def test_what_a_lease_uses_is_measured(isolation: Isolation, children: list) -> None:
    isolation.create(LEASE, Share((0,), 256 * MIB))
    busy = (
        "x = bytearray(b'x') * (64 * 2**20); [None for _ in range(10**6)]; print('done', flush=True); input()"
    )
    child = _start(children, busy)
    isolation.attach(LEASE, child.pid)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "done\n"
    used = isolation.consumption(LEASE)
    assert used.rss_bytes >= 64 * MIB
    assert used.cpu_ns > 10**7


def test_destroying_a_lease_takes_its_children_and_grandchildren(
    isolation: Isolation, children: list
) -> None:
    isolation.create(LEASE, Share((0,), 256 * MIB))
    child = _start(children, "pid = os.fork(); print(pid, flush=True) if pid else None; time.sleep(600)")
    isolation.attach(LEASE, child.pid)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    grandchild = int(child.stdout.readline())
    started = start_ticks(grandchild)
    assert is_alive(grandchild, started)
    isolation.destroy(LEASE)
    isolation.destroy(LEASE)
    assert not is_alive(grandchild, started)
    assert child.wait(5) == -signal.SIGKILL


def test_a_reserved_process_is_under_the_lease_that_takes_it(isolation: Isolation, children: list) -> None:
    core = min(os.sched_getaffinity(0))
    child = _start(children, _SHOW_CORES)
    isolation.reserve(child.pid)
    isolation.create(LEASE, Share((core,), 128 * MIB), child.pid)
    isolation.attach(LEASE, child.pid)
    assert _go(child) == (_cores_shown(isolation, core), 0)


def test_a_reserve_that_joins_another_lease_leaves_no_group(isolation: Isolation, children: list) -> None:
    isolation.create(LEASE, Share((0,), 128 * MIB))
    child = _start(children, "")
    isolation.reserve(child.pid)
    isolation.attach(LEASE, child.pid)
    assert isolation.remains() in ([], [LEASE])


def test_a_reserve_can_be_dropped(isolation: Isolation, children: list) -> None:
    child = _start(children, "time.sleep(600)")
    isolation.reserve(child.pid)
    child.kill()
    isolation.destroy(reserve_name(child.pid))
    assert isolation.remains() == []


def test_a_later_agent_finds_the_leases_of_an_earlier_one(isolation: Isolation, children: list) -> None:
    tag = f"t{secrets.token_hex(4)}"
    child = _start(children, "time.sleep(600)")
    earlier = [sys.executable, "-c", _AGENT, type(isolation).__name__, tag, str(child.pid)]
    subprocess.run(earlier, check=True, timeout=60)
    later = type(isolation)(tag)
    assert later.probe() == ""
    assert later.remains() == ([] if later.mechanism == "none" else [LEASE])
    later.destroy(LEASE)
    assert later.remains() == []
    assert later.mechanism == "none" or child.wait(5) == -signal.SIGKILL
