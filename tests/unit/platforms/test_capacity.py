"""What of this machine may be leased."""

import os
from pathlib import Path

import pytest

from isthmus.core.errors import SettingsError
from isthmus.core.settings import NodeSettings, load
from isthmus.platforms import capacity


def test_settings_win() -> None:
    settings = NodeSettings(cores=7, memory="3GiB")
    assert (capacity.cores(settings), capacity.memory_bytes(settings)) == (7, 3 * 2**30)


def test_without_settings_it_is_what_this_process_may_use() -> None:
    assert 1 <= capacity.cores(NodeSettings()) <= len(os.sched_getaffinity(0))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < capacity.memory_bytes(NodeSettings()) <= physical * capacity.MEMORY_SHARE


def test_affinity_narrows_it() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert capacity.cores(NodeSettings()) == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 2), ("max 100000", 0), ("", 0), ("1000 100000", 1)]
)
def test_a_quota_is_rounded_up_to_whole_cores(
    monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    monkeypatch.setattr(capacity, "_read", lambda name: quota if name == "cpu.max" else "")
    assert capacity._cgroup_cores() == cores


def test_a_memory_size_that_is_none_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"not a size.*at `\$\.node`"):
        load(environ={"HOME": str(tmp_path), "ISTHMUS_NODE__MEMORY": "plenty"})


def test_a_place_to_listen_at_that_nobody_can_resolve_is_refused_at_start() -> None:
    with pytest.raises(SettingsError, match=r"node\.listen: .*no\.\.host"):
        capacity.check(NodeSettings(listen="tcp://no..host:0"))
    capacity.check(NodeSettings(listen="tcp://127.0.0.1:0"))
