"""Where an agent that lends keeps its state: a directory whose name others can guess."""

import fcntl
import os
from pathlib import Path

import pytest

from isthmus.core.errors import SettingsError
from isthmus.node.lending import DIRECTORY_PREFIX, LOCK_FILE, enter_state


def left_by_another(base: Path, job: int) -> Path:
    """An hour ago."""
    state = base / f"{DIRECTORY_PREFIX}{job}-n7"
    state.mkdir()
    (state / LOCK_FILE).touch()
    os.utime(state, (0, 0))
    return state


def test_an_agent_removes_what_killed_ones_left_but_not_its_own_nor_what_is_in_use(tmp_path: Path) -> None:
    own, abandoned, used = (left_by_another(tmp_path, job) for job in (1, 2, 3))
    (own / "records").touch()
    with (used / LOCK_FILE).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        enter_state(own)
    assert (own / "records").exists(), "it is another try of the same"
    assert used.exists()
    assert not abandoned.exists()


def test_a_directory_is_made_for_its_user_alone(tmp_path: Path) -> None:
    state = tmp_path / f"{DIRECTORY_PREFIX}1-n7"
    enter_state(state)
    assert state.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_could_have_made_is_refused(tmp_path: Path) -> None:
    elsewhere, open_to_all, file = tmp_path / "elsewhere", tmp_path / "open", tmp_path / "file"
    elsewhere.mkdir()
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    file.touch()
    link = tmp_path / f"{DIRECTORY_PREFIX}1-n7"
    link.symlink_to(elsewhere)
    for state in (link, open_to_all, file):
        with pytest.raises(SettingsError):
            enter_state(state)
