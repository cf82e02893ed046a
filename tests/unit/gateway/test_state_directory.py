"""A site's state directory is its user's alone."""

import os
import stat
from pathlib import Path

import pytest

from isthmus.core.errors import SettingsError
from isthmus.gateway import state_directory


def test_it_is_closed_to_others_even_if_it_was_open(tmp_path):
    (tmp_path / "state").mkdir(mode=0o755)
    with state_directory.hold(tmp_path / "state"):
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_one_that_belongs_to_another_user_is_refused(tmp_path):
    foreign = Path("/usr")
    if os.geteuid() == 0:
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        os.chown(foreign, 12345, 12345)
    with pytest.raises(SettingsError, match="belongs to another user"), state_directory.hold(foreign):
        pytest.fail("a foreign directory was taken")


def test_its_holder_is_known_while_it_is_held(tmp_path):
    with state_directory.hold(tmp_path):
        assert state_directory.holder(tmp_path) == os.getpid()
        with pytest.raises(SettingsError, match=rf"another site \(pid {os.getpid()} on "):
            with state_directory.hold(tmp_path):
                pytest.fail("two sites have one directory")
    assert state_directory.holder(tmp_path) == 0


def test_a_process_id_of_another_machine_is_none_of_ours(tmp_path):
    with state_directory.hold(tmp_path):
        (tmp_path / "lock").write_text("17 login2")
        with pytest.raises(SettingsError, match="runs on login2: stop it there"):
            state_directory.holder(tmp_path)
