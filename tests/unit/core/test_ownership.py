"""Whose a directory is."""

import os

import pytest

from isthmus.core.ownership import is_ours


def _closed(path):
    path.mkdir(mode=0o700)


def _open(path):
    path.mkdir()
    path.chmod(0o750)


def _link(path):
    _closed(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _file(path):
    path.touch(mode=0o700)


@pytest.mark.parametrize(
    ("make", "ours", "alone"),
    [(_closed, True, True), (_open, True, False), (_link, False, False), (_file, False, False)],
)
def test_a_directory_is_ours_alone_when_nobody_else_can_enter_it(make, ours, alone, tmp_path):
    make(tmp_path / "it")
    assert (is_ours(tmp_path / "it", alone=False), is_ours(tmp_path / "it")) == (ours, alone)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_strangers_directory_is_not_ours(tmp_path):
    _closed(tmp_path / "it")
    os.chown(tmp_path / "it", 12345, 12345)
    assert not is_ours(tmp_path / "it", alone=False)
