"""Where the sockets of executors may lie."""

import stat

import pytest

from isthmus.core.errors import FabricError
from isthmus.node.hosting import make_private


def test_a_directory_for_sockets_is_ours_alone(tmp_path):
    for _ in range(2):  # also when it is there from before
        make_private(tmp_path / "sockets")
    assert stat.S_IMODE((tmp_path / "sockets").stat().st_mode) == 0o700


def _link(path):
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def _open_to_all(path):
    path.mkdir()
    path.chmod(0o777)


@pytest.mark.parametrize("prepare", [_link, _open_to_all])
def test_what_another_may_have_put_there_is_not_used(tmp_path, prepare):
    prepare(tmp_path / "sockets")
    with pytest.raises(FabricError, match="not this user's alone"):
        make_private(tmp_path / "sockets")
