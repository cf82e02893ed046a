"""Which control files the mechanisms write, on directories that stand for the kernel's."""

import os
from pathlib import Path

import pytest

from isthmus.core.errors import SettingsError
from isthmus.core.ids import LeaseId
from isthmus.node.isolation import CgroupV1, CgroupV2, Rlimits, Share, choose, groups, state_tag
from isthmus.node.isolation.cgroup_v1 import parse_cores
from isthmus.node.isolation.layers import RefusedError, run

LEASE = LeaseId("ls_a")
SHARE = Share((0, 2), 256 * 2**20)


@pytest.mark.parametrize(
    ("text", "cores"), [("0-3,8\n", [0, 1, 2, 3, 8]), ("5", [5]), ("\n", []), ("0,2-3", [0, 2, 3])]
)
def test_sets_of_cores_are_read_as_the_kernel_writes_them(text: str, cores: list[int]) -> None:
    assert parse_cores(text) == cores


def test_version_2_writes_every_limit(tmp_path: Path) -> None:
    group = tmp_path / "isthmus-tag-ls_a"
    group.mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu cpuset memory pids\n")
    for name in ("cpuset.cpus", "cpu.weight", "memory.max", "memory.swap.max", "pids.max"):
        (group / name).touch()
    CgroupV2("tag", base=tmp_path).create(LEASE, SHARE)
    assert (group / "cpuset.cpus").read_text() == "0,2"
    assert (group / "memory.max").read_text() == str(SHARE.memory_bytes)
    assert (group / "memory.swap.max").read_text() == "0"
    assert int((group / "pids.max").read_text()) > 0
    assert (group / "cpu.weight").read_text() == "200"


def test_version_2_without_cpuset_gives_a_quota_and_says_so(tmp_path: Path) -> None:
    group = tmp_path / "isthmus-tag-ls_a"
    group.mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    for name in ("cpu.max", "cpu.weight", "memory.max", "pids.max"):
        (group / name).touch()
    enforcement = CgroupV2("tag", base=tmp_path).create(LEASE, SHARE)
    assert (group / "cpu.max").read_text() == "200000 100000"
    assert enforcement.cores == "cpu-quota"
    assert "no cpuset" in enforcement.detail


def test_version_2_gives_a_harvested_lease_only_what_idles(tmp_path: Path) -> None:
    group = tmp_path / "isthmus-tag-ls_a"
    group.mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu memory pids")
    files = ("cpuset.cpus", "cpu.weight", "cpu.idle", "cpu.max", "memory.max", "pids.max", "cgroup.freeze")
    for name in files:
        (group / name).touch()
    isolation = CgroupV2("tag", base=tmp_path)
    isolation.create(LEASE, Share((0, 1, 2, 3), 256 * 2**20, idle_cores=2))
    assert (group / "cpu.idle").read_text() == "1"
    assert (group / "cpu.max").read_text() == "200000 100000"
    isolation.freeze(LEASE)
    assert (group / "cgroup.freeze").read_text() == "1"
    isolation.thaw(LEASE)
    assert (group / "cgroup.freeze").read_text() == "0"


def test_version_2_reads_what_a_lease_used(tmp_path: Path) -> None:
    group = tmp_path / "isthmus-tag-ls_a"
    group.mkdir()
    (group / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    (group / "memory.stat").write_text("anon 4096\nfile 8192\n")
    (group / "memory.peak").write_text("9000\n")
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    isolation = CgroupV2("tag", base=tmp_path)
    assert isolation.consumption(LEASE) == (1_500_000_000, 4096, 9000)
    assert isolation.oom_kills(LEASE) == 1
    assert isolation.remains() == ["ls_a"]


def test_version_2_without_controllers_says_which_are_missing(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("io pids\n")
    assert "memory, cpuset or cpu" in CgroupV2("tag", base=tmp_path).probe()


def test_version_1_without_hierarchies_says_so() -> None:
    assert CgroupV1("tag", mounts={}).probe() == "no version 1 hierarchy for cpuset and memory"


def test_what_is_gone_counts_nothing() -> None:
    isolation = CgroupV1("tag", mounts={})
    assert isolation.consumption(LEASE) == (0, 0, 0)
    assert isolation.oom_kills(LEASE) == 0
    isolation.destroy(LEASE)


def test_old_empty_groups_of_forgotten_agents_are_swept_and_nothing_else(tmp_path: Path) -> None:
    old = ("isthmus-dead-ls_a", "isthmus-dead-ls_busy", "stranger")
    for name in (*old, "isthmus-dead-ls_new"):
        (tmp_path / name).mkdir()
    (tmp_path / "isthmus-dead-ls_busy" / "cgroup.procs").write_text("1\n")
    for name in old:
        os.utime(tmp_path / name, (0, 0))
    CgroupV2("tag", base=tmp_path).sweep()
    assert not (tmp_path / "isthmus-dead-ls_a").exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_refused_write_names_the_file_and_the_value(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"writing 7.*memory\.max"):
        groups.write(tmp_path / "memory.max", 7)


def test_a_mechanism_that_is_named_but_does_not_work_is_an_error() -> None:
    if os.environ.get("XDG_RUNTIME_DIR"):
        pytest.skip("this machine may have systemd delegation")
    with pytest.raises(SettingsError, match="systemd"):
        choose("systemd", "tag")


def test_choosing_by_hand_takes_the_weak_one() -> None:
    isolation, _ = choose("none", "tag")
    assert isinstance(isolation, Rlimits)


def test_two_state_directories_never_share_groups(tmp_path: Path) -> None:
    assert state_tag(tmp_path / "a") != state_tag(tmp_path / "b")
    assert state_tag(tmp_path / "a") == state_tag(tmp_path / "b" / ".." / "a")


def test_a_command_is_asked_for_english_and_what_it_complains_of_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert run("sh", "-c", "echo $LC_ALL", limit_s=60.0) == "C.UTF-8\n"
    with pytest.raises(RefusedError, match="`sh -c echo 'it  may not' >&2; exit 3`: it may not") as refused:
        run("sh", "-c", "echo 'it  may not' >&2; exit 3", limit_s=60.0)
    assert refused.value.complaint == "it may not"
    with pytest.raises(RefusedError, match="exit code 3"):
        run("sh", "-c", "exit 3", limit_s=60.0)
    with pytest.raises(OSError, match=r"takes longer than 0\.01 s"):
        run("sleep", "60", limit_s=0.01)
