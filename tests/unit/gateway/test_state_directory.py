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
