"""What remains of leases when their processes are killed, run wild, or are left alone."""

import os
import secrets
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from isthmus.core.model import EndReason, Environment, Resources
from isthmus.fabric.frames import Kind
from isthmus.node.messages import (
    AddExecutor,
    Done,
    EndLease,
    ExecutorEnded,
    Failed,
    KillExecutor,
    LeaseEnded,
    ReadLog,
    RenewLease,
    StartLease,
    Warm,
)
from isthmus.node.socket_paths import short_directory
from tests.live.node_peer import (
    Agent,
    Client,
    Site,
    ended,
    lease_order,
    running_node,
    start_lease,
)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Site, Agent]]:
    with running_node(tmp_path / "state") as node:
        yield node


def test_a_killed_executor_is_reported_and_ends_its_lease(node: tuple[Site, Agent]) -> None:
    site, _ = node
    executor = start_lease(site, "ls_a")
    with Client(executor.address, "ls_a") as client:
        call = client.start(client.define(lambda: time.sleep(60)))
        client.domain.poll(0.1)
        os.kill(executor.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        assert client.frame(call, 5).kind == Kind.LOST
        assert time.monotonic() - killed_s < 1
    assert site.wait_report(ExecutorEnded, lease="ls_a").detail == "signal SIGKILL"
    assert ended(site, "ls_a").reason == EndReason.KILLED
    assert start_lease(site, "ls_b").pid != executor.pid


def test_executors_outlive_their_zygote(node: tuple[Site, Agent]) -> None:
    site, agent = node
    executor = start_lease(site, "ls_a")
    with Client(executor.address, "ls_a") as client:
        function = client.define(lambda: "alive")
        for zygote in _children(agent.process.pid):
            os.kill(zygote, signal.SIGKILL)
        assert client.call(function) == "alive"
        more = site.done(AddExecutor, lease="ls_a").executor
        assert more is not None
        with Client(more.address, "ls_a") as second:
            assert second.call(second.define(lambda: "born later")) == "born later"
    site.done(EndLease, lease="ls_a", reason=EndReason.RELEASED)
    assert ended(site, "ls_a").usage.calls == 2


def test_a_new_agent_adopts_what_the_killed_one_left(node: tuple[Site, Agent], tmp_path: Path) -> None:
    site, agent = node
    executor = start_lease(site, "ls_a")
    with Client(executor.address, "ls_a") as client:
        function = client.define(lambda: "alive")
        client.call(function)
        agent.kill()
        assert client.call(function) == "alive"
        successor = Agent(site, agent.state)
        try:
            site.wait(lambda: len(site.hellos) == 2)
            assert [(lease.lease, lease.executors) for lease in site.hellos[1].running] == [
                ("ls_a", (executor,))
            ]
            repeated = site.done(StartLease, **lease_order("ls_a"))
            assert repeated.executor == executor
            assert client.call(function) == "alive"
            site.done(EndLease, lease="ls_a", reason=EndReason.RELEASED)
            assert ended(site, "ls_a").usage.calls == 3
            assert client.frame(10**6, 5).kind == Kind.LOST
        finally:
            successor.stop()


def test_an_agent_that_cannot_adopt_ends_alone_and_leaves_it_to_the_next(node: tuple[Site, Agent]) -> None:
    site, agent = node
    executor = start_lease(site, "ls_a")
    with Client(executor.address, "ls_a") as client:
        function = client.define(lambda: "alive")
        agent.kill()
        unforeseen = agent.state / "leases" / "ls_a" / "ex_0.page"
        unforeseen.mkdir()
        assert Agent(site, agent.state).process.wait(20) == 1
        assert client.call(function) == "alive"
        unforeseen.rmdir()
        successor = Agent(site, agent.state)
        try:
            site.wait(lambda: len(site.hellos) == 2)
            assert [lease.executors for lease in site.hellos[1].running] == [(executor,)]
            assert client.call(function) == "alive"
        finally:
            successor.stop()


def test_an_agent_that_cannot_adopt_but_was_told_to_end_everything_does(node: tuple[Site, Agent]) -> None:
    site, agent = node
    executor = start_lease(site, "ls_a")
    with Client(executor.address, "ls_a") as client:
        agent.kill()
        unforeseen = agent.state / "leases" / "ls_a" / "ex_z.page"
        unforeseen.mkdir()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            successor = Agent(site, agent.state)  # is told before it looks, as by a site that stops
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        assert successor.stop() == 1
        assert client.frame(10**6, 5).kind == Kind.LOST


def test_an_executor_that_died_without_an_agent_is_reported_by_the_next(node: tuple[Site, Agent]) -> None:
    site, agent = node
    executor = start_lease(site, "ls_a")
    agent.kill()
    os.kill(executor.pid, signal.SIGKILL)
    successor = Agent(site, agent.state)
    try:
        assert ended(site, "ls_a").reason == EndReason.KILLED
        assert site.hellos[-1].running == ()
        free = start_lease(site, "ls_b", resources=Resources(cores=os.cpu_count() or 1, memory="64MiB"))
        assert free is not None
    finally:
        successor.stop()


def test_an_executor_fences_itself_when_nobody_guards_its_lease(node: tuple[Site, Agent]) -> None:
    site, agent = node
    executor = start_lease(site, "ls_a")
    site.done(RenewLease, lease="ls_a", deadline_s=time.time() + 1.0)
    agent.kill()
    with Client(executor.address, "ls_a") as client:
        call = client.start(client.define(lambda: time.sleep(60)))
        assert client.frame(call, 6).kind == Kind.LOST
    successor = Agent(site, agent.state)
    site.wait(lambda: len(site.hellos) == 2)
    successor.stop()


def test_a_lease_that_nobody_renews_expires(node: tuple[Site, Agent]) -> None:
    site, _ = node
    for lease in ("ls_a", "ls_b"):
        start_lease(site, lease)
        site.done(RenewLease, lease=lease, deadline_s=time.time() + 0.8)
    site.done(RenewLease, lease="ls_b", deadline_s=time.time() + 60)
    assert ended(site, "ls_a").reason == EndReason.EXPIRED
    assert all(report.lease != "ls_b" for report in site.reports if isinstance(report, LeaseEnded))


def test_an_expired_lease_with_a_client_lives_on_while_the_site_is_away(tmp_path: Path) -> None:
    with running_node(tmp_path / "state", orphan_s=30.0) as (site, _):
        with_client = start_lease(site, "ls_a")
        start_lease(site, "ls_b")
        with Client(with_client.address, "ls_a") as client:
            function = client.define(lambda: "alive")
            assert client.call(function) == "alive"
            for lease in ("ls_a", "ls_b"):
                site.done(RenewLease, lease=lease, deadline_s=time.time() + 0.5)
            site.close()
            _until(lambda: not (tmp_path / "state" / "leases" / "ls_b").exists())
            assert client.call(function) == "alive"
            back = Site(site.join_key, orphan_s=30.0, port=site.port)
            try:
                assert ended(back, "ls_b").reason == EndReason.EXPIRED
                assert ended(back, "ls_a").reason == EndReason.EXPIRED
            finally:
                back.close()


def test_an_agent_that_ends_removes_sockets_that_nobody_knew_of_from_below_tmp(tmp_path: Path) -> None:
    state = tmp_path / ("long" * 25)
    with running_node(state) as (site, _):
        start_lease(site, "ls_a")
        (short_directory(state) / "ex_of_a_killed_agent.sock").touch()


def test_an_agent_without_its_site_for_longer_than_the_orphan_time_ends_everything(tmp_path: Path) -> None:
    with running_node(tmp_path / "state", orphan_s=0.2, meter_s=0.03) as (site, agent):
        start_lease(site, "ls_a")
        site.close()
        assert agent.process.wait(15) == 0


def test_all_ends_with_the_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with running_node(tmp_path / "state", parent=parent.pid) as (site, agent):
        executor = start_lease(site, "ls_a")
        parent.kill()
        parent.wait()
        assert agent.process.wait(15) == 0
        assert not Path(f"/proc/{executor.pid}").exists()
    assert parent.stdin is not None
    parent.stdin.close()


def test_memory_beyond_the_lease_kills_the_function_and_names_the_reason(node: tuple[Site, Agent]) -> None:
    site, _ = node
    if site.hellos[0].enforcement.memory != "cgroup":
        pytest.skip(f"no memory cgroup here: {site.hellos[0].enforcement.detail}")
    executor = start_lease(site, "ls_a", resources=Resources(cores=1, memory="128MiB"))
    with Client(executor.address, "ls_a") as client:
        call = client.start(client.define(lambda: len(bytearray(os.urandom(1)) * 2**30)))
        assert client.frame(call).kind == Kind.LOST
    died = site.wait_report(ExecutorEnded, lease="ls_a")
    assert died.reason == EndReason.OUT_OF_MEMORY
    assert "128MiB" in died.detail
    assert ended(site, "ls_a").reason == EndReason.OUT_OF_MEMORY
    assert start_lease(site, "ls_b").address


def test_a_fork_bomb_stays_inside_its_lease(node: tuple[Site, Agent]) -> None:
    site, _ = node
    if site.hellos[0].enforcement.mechanism == "none":
        pytest.skip("no cgroup here")

    def bomb() -> int:
        children = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(600)
                    os._exit(0)
                children += 1
        except OSError:
            return children

    executor = start_lease(site, "ls_a", resources=Resources(cores=1, memory="2GiB"))
    with Client(executor.address, "ls_a") as client:
        assert 100 < client.call(client.define(bomb)) < 520
    site.done(EndLease, lease="ls_a", reason=EndReason.RELEASED)
    assert ended(site, "ls_a")


def test_a_function_that_ignores_sigterm_is_killed_after_the_grace(node: tuple[Site, Agent]) -> None:
    site, _ = node

    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)

    executor = start_lease(site, "ls_a")
    with Client(executor.address, "ls_a") as client:
        call = client.start(client.define(stubborn))
        client.domain.poll(0.2)
        asked_s = time.monotonic()
        site.done(EndLease, lease="ls_a", reason=EndReason.EVICTED, grace_s=0.5)
        assert 0.4 < time.monotonic() - asked_s < 3
        assert client.frame(call).kind == Kind.LOST


def test_a_running_call_may_end_within_the_grace(node: tuple[Site, Agent]) -> None:
    site, _ = node

    def tidy() -> None:
        try:
            time.sleep(60)
        finally:
            print("tidied up", flush=True)
            Path(marker).write_text("done")

    marker = str(node[1].state / "marker")
    executor = start_lease(site, "ls_a")
    with Client(executor.address, "ls_a") as client:
        client.start(client.define(tidy))
        client.domain.poll(0.2)
        site.done(EndLease, lease="ls_a", reason=EndReason.EVICTED, grace_s=5.0)
    assert Path(marker).read_text() == "done"


def test_orders_repeated_change_nothing(node: tuple[Site, Agent]) -> None:
    site, _ = node
    order = lease_order("ls_a")
    first, again = site.done(StartLease, **order), site.done(StartLease, **order)
    assert first.executor == again.executor
    for _ in range(2):
        assert isinstance(site.order(EndLease, lease="ls_a", reason=EndReason.RELEASED), Done)
    assert not site.done(KillExecutor, lease="ls_a", executor="ex_unknown").killed


def test_a_lease_that_asks_for_more_cores_than_are_free_is_refused(node: tuple[Site, Agent]) -> None:
    site, _ = node
    cores = len(os.sched_getaffinity(0))
    start_lease(site, "ls_a", resources=Resources(cores=cores, memory="64MiB"))
    refused = site.order(StartLease, **lease_order("ls_b"))
    assert isinstance(refused, Failed)
    assert refused.code == "NoCapacityError"
    site.done(EndLease, lease="ls_a", reason=EndReason.RELEASED)
    assert start_lease(site, "ls_b")


def test_leases_run_on_cores_of_their_own(node: tuple[Site, Agent]) -> None:
    site, _ = node
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    seen = []
    for lease in ("ls_a", "ls_b"):
        with Client(start_lease(site, lease).address, lease) as client:
            seen.append(client.call(client.define(lambda: os.sched_getaffinity(0))))
    assert all(len(cores) == 1 for cores in seen)
    assert seen[0] != seen[1]


def test_one_lease_has_at_most_64_executors(node: tuple[Site, Agent]) -> None:
    site, _ = node
    start_lease(site, "ls_a", resources=Resources(cores=1, memory="4GiB"))
    answers = [site.order(AddExecutor, lease="ls_a") for _ in range(64)]
    assert all(isinstance(answer, Done) for answer in answers[:63])
    assert isinstance(answers[63], Failed)
    assert answers[63].code == "InvalidRequestError"


def test_a_killed_extra_executor_leaves_the_lease_alone(node: tuple[Site, Agent]) -> None:
    site, _ = node
    first = start_lease(site, "ls_a")
    extra = site.done(AddExecutor, lease="ls_a").executor
    assert extra is not None
    assert site.done(KillExecutor, lease="ls_a", executor=extra.executor).killed
    with Client(first.address, "ls_a") as client:
        assert client.call(client.define(lambda: 1)) == 1


def test_output_beyond_the_limit_is_dropped_at_its_head(tmp_path: Path) -> None:
    with running_node(tmp_path / "state", log_bytes_max=8192) as (site, _):
        executor = start_lease(site, "ls_a")
        with Client(executor.address, "ls_a") as client:
            client.call(
                client.define(lambda: print("x" * 99 + "\n" * 1, end="", sep="") or print("y" * 200_000))
            )
            client.call(client.define(lambda: print("the end")))
        log = tmp_path / "state" / "leases" / "ls_a" / "log"
        site.wait(lambda: log.stat().st_blocks * 512 <= 16384)
        answer = site.done(ReadLog, lease="ls_a", offset=0, limit_bytes=10**6)
        assert answer.text.endswith("y\nthe end\n")
        assert len(answer.text) < 10_000


def test_an_environment_is_built_once_and_its_requirements_import(
    node: tuple[Site, Agent], tmp_path: Path
) -> None:
    site, _ = node
    wheel = _wheel(tmp_path)
    environment = Environment(requirements=(f"islet @ file://{wheel}",), preload=("islet",))
    took_s = []
    for lease in ("ls_a", "ls_b"):
        started_s = time.monotonic()
        executor = start_lease(site, lease, environment=environment)
        took_s.append(time.monotonic() - started_s)
        with Client(executor.address, lease) as client:
            assert client.call(client.define(lambda: __import__("islet").ANSWER)) == 42
    assert took_s[1] < took_s[0] / 4


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (Environment(requirements=("no-such @ file:///no/no_such-1-py3-none-any.whl",)), "no_such-1"),
        (Environment(python="/no/such/python"), "/no/such/python"),
        (Environment(preload=("no_such_module",)), "no_such_module"),
    ],
    ids=["requirement", "interpreter", "preload"],
)
def test_an_environment_that_cannot_be_had_is_refused_with_the_cause(
    node: tuple[Site, Agent], environment: Environment, complaint: str
) -> None:
    site, _ = node
    refused = site.order(StartLease, **lease_order("ls_a", environment=environment))
    assert isinstance(refused, Failed)
    assert refused.code == "FunctionLoadError"
    assert complaint in refused.message


def test_spares_are_kept_and_dismissed_on_order(node: tuple[Site, Agent]) -> None:
    site, agent = node
    site.done(Warm, environment=Environment(), spares=2)
    (zygote,) = _children(agent.process.pid)
    _until(lambda: len(_children(zygote)) == 2)
    site.done(Warm, environment=Environment(), spares=0)
    _until(lambda: _children(agent.process.pid) == [])


def test_a_site_without_the_join_key_is_not_obeyed(tmp_path: Path) -> None:
    site = Site(secrets.token_bytes(32))
    agent = Agent(site, tmp_path / "state")
    site.join_key = secrets.token_bytes(32)
    try:
        site.wait(lambda: site.hellos)
        site.wait(lambda: len(site.hellos) > 1)
        assert agent.process.poll() is None
    finally:
        agent.stop()
        site.close()


def test_a_second_agent_for_the_same_state_is_turned_away(node: tuple[Site, Agent]) -> None:
    site, agent = node
    second = Agent(site, agent.state)
    assert second.process.wait(10) == 2


def test_without_cgroups_the_limits_are_named_for_what_they_are(tmp_path: Path) -> None:
    with running_node(tmp_path / "state", isolation="none") as (site, _):
        enforcement = site.hellos[0].enforcement
        assert (enforcement.cores, enforcement.memory, enforcement.mechanism) == (
            "affinity",
            "rlimit",
            "none",
        )
        executor = start_lease(site, "ls_a", resources=Resources(cores=1, memory="256MiB"))
        with Client(executor.address, "ls_a") as client:
            with pytest.raises(MemoryError):
                client.call(client.define(lambda: len(bytearray(2**30))))
            assert len(client.call(client.define(lambda: os.sched_getaffinity(0)))) == 1
            daemon = client.call(client.define(_leave_a_child_behind))
        site.done(EndLease, lease="ls_a", reason=EndReason.RELEASED)
        assert ended(site, "ls_a").usage.cpu_s > 0
        assert not Path(f"/proc/{daemon}/exe").exists()


def _leave_a_child_behind() -> int:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return child


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _until(condition: object, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def _wheel(directory: Path) -> Path:
    """A wheel of one module, made by hand: no index and no build is needed to install it."""
    path = directory / "islet-1.0-py3-none-any.whl"
    info = "islet-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("islet.py", "ANSWER = 42\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: islet\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
