"""Cache on the node's disk: a directory for each lease, of its size where that can be held, gone with it."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import isthmus
from isthmus.core.errors import SettingsError
from isthmus.core.ids import LeaseId
from isthmus.core.settings import NodeSettings
from isthmus.node.isolation import Cached, Rlimits, Share, cache_of
from tests.live.sdk_functions import fill, fill_cache
from tests.live.sites import running_site

LEASE = LeaseId("ls_cache")
SIZE_BYTES = 32 * 2**20
SHARE = Share((0,), 2**28, amounts=(("cache", SIZE_BYTES),))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "disk"
    left = [path for path in (tmp_path / "disk").glob("*/data") if path.is_mount()]
    assert left == []


def _agent(disk: Path, state: Path) -> Cached:
    """Of a state directory; skips where the system lets nobody mount."""
    state.mkdir(exist_ok=True)
    made = Cached(Rlimits("tag"), disk, state, "tag")
    reason = made.probe()
    if reason:
        pytest.skip(reason)
    return made


def test_a_lease_writes_no_more_than_it_holds_and_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    agent = _agent(disk, tmp_path / "state")
    assert agent.enforcement.amounts == {"cache": "loop-mount"}
    assert list(disk.iterdir()) == []
    agent.create(LEASE, SHARE)
    data = cache_of(LEASE, disk, "tag")
    assert data.stat().st_mode & 0o777 == 0o700
    assert list(data.iterdir()) == []
    assert SIZE_BYTES * 0.8 < fill(data, 2 * SIZE_BYTES) <= SIZE_BYTES
    agent.destroy(LEASE)
    assert list(disk.iterdir()) == []
    agent.destroy(LEASE)


def test_an_agent_that_comes_back_finds_what_a_lease_had(disk: Path, tmp_path: Path) -> None:
    agent = _agent(disk, tmp_path / "state")
    agent.create(LEASE, SHARE)
    (cache_of(LEASE, disk, "tag") / "kept").write_text("here")
    again = _agent(disk, tmp_path / "state")
    assert again.remains() == [LEASE]
    again.create(LEASE, SHARE)
    assert (cache_of(LEASE, disk, "tag") / "kept").read_text() == "here"
    again.sweep()
    assert again.remains() == [LEASE]
    again.destroy(LEASE)


def test_what_an_agent_left_that_is_no_more_is_removed_by_the_next(disk: Path, tmp_path: Path) -> None:
    _agent(disk, tmp_path / "gone").create(LEASE, SHARE)
    other = Cached(Rlimits("other"), disk, tmp_path, "other")
    other.probe()
    other.sweep()
    assert cache_of(LEASE, disk, "tag").is_mount()  # its agent may come back
    shutil.rmtree(tmp_path / "gone")
    other.sweep()
    assert list(disk.iterdir()) == []


def test_what_others_put_there_is_left_alone_and_never_unmounted(disk: Path, tmp_path: Path) -> None:
    """Where all may write, anybody may make such a directory, with a link that leads root where he likes."""
    agent = _agent(disk, tmp_path / "state")
    agent.create(LEASE, SHARE)
    mounted = cache_of(LEASE, disk, "tag")
    for name in ("theirs", "tag-ls_theirs", "tag-probe"):
        trap = disk / f"isthmus-{name}"
        trap.mkdir(mode=0o700)
        (trap / "owner").symlink_to("/none")
        (trap / "data").symlink_to(mounted)
        os.chown(trap, 65534, 65534)
    again = _agent(disk, tmp_path / "state")
    again.sweep()
    assert again.remains() == [LEASE]
    again.destroy(LeaseId("ls_theirs"))
    with pytest.raises(PermissionError, match="not this user's alone; remove it"):
        again.create(LeaseId("ls_theirs"), SHARE)
    assert mounted.is_mount()
    assert len(list(disk.iterdir())) == 4
    again.destroy(LEASE)


def test_a_link_in_place_of_a_file_system_is_removed_and_not_followed(disk: Path, tmp_path: Path) -> None:
    agent = _agent(disk, tmp_path / "state")
    agent.create(LEASE, SHARE)
    mounted = cache_of(LEASE, disk, "tag")
    linked = disk / "isthmus-linked"
    linked.mkdir(mode=0o700)
    (linked / "owner").symlink_to("/none")
    (linked / "data").symlink_to(mounted)
    agent.sweep()
    assert not linked.exists()
    assert mounted.is_mount()
    agent.destroy(LEASE)


def test_one_that_cannot_be_judged_keeps_no_other_from_being_removed(disk: Path, tmp_path: Path) -> None:
    for name, owner in (("a", "none"), ("b", "a" * 300), ("c", "none")):
        (disk / f"isthmus-{name}").mkdir(mode=0o700, parents=True)
        (disk / f"isthmus-{name}" / "owner").symlink_to(owner)
    Cached(Rlimits("tag"), disk, tmp_path, "tag").sweep()
    assert [path.name for path in disk.iterdir()] == ["isthmus-b"]


def test_a_cache_that_somebody_looks_at_is_removed_all_the_same(disk: Path, tmp_path: Path) -> None:
    agent = _agent(disk, tmp_path / "state")
    agent.create(LEASE, SHARE)
    with (cache_of(LEASE, disk, "tag") / "open").open("wb"):
        agent.destroy(LEASE)
        assert list(disk.iterdir()) == []


def test_without_the_right_to_mount_there_is_a_directory_of_any_size(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    agent = Cached(Rlimits("tag"), disk, tmp_path, "tag")
    assert "not installed: mkfs.ext4, mount" in agent.probe()
    assert agent.enforcement.amounts == {}
    agent.create(LEASE, SHARE)
    assert fill(cache_of(LEASE, disk, "tag"), SIZE_BYTES + 2**20) == SIZE_BYTES + 2**20
    agent.destroy(LEASE)
    assert list(disk.iterdir()) == []


def test_a_path_that_keeps_nothing_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="nothing can be kept there"):
        Cached(Rlimits("tag"), tmp_path / "file", tmp_path, "tag").probe()
    with pytest.raises(ValueError, match="cache needs cache_path"):
        NodeSettings(cache="1GiB")


def test_a_function_finds_its_cache_and_the_site_says_how_it_is_held(disk: Path, tmp_path: Path) -> None:
    settings = {"ISTHMUS_NODE__CACHE": "1GiB", "ISTHMUS_NODE__CACHE_PATH": str(disk)}
    with running_site(tmp_path / "state", **settings) as site:
        with isthmus.connect(site.url, api_key=site.key) as client:
            where, written_bytes = client.call(fill_cache, 128 * 2**20)
            (lease,) = [one for one in client.leases() if one.resources.amounts]
            held = lease.enforcement.amounts["cache"]
            assert held == ("loop-mount" if os.path.ismount(where) else "accounted-only")
            assert written_bytes == 128 * 2**20 if held == "accounted-only" else written_bytes < 64 * 2**20
            assert os.listdir(where) == ["filling"]
        with site.client() as operator:
            operator.delete(f"/v1/leases/{lease.lease}")
            assert not os.path.exists(where)
            (node,) = operator.get("/v1/nodes").json()
            assert (node["amounts"], node["enforcement"]["amounts"]) == ({"cache": 2**30}, {"cache": held})
    assert list(disk.iterdir()) == []
