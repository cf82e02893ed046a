"""Where the sockets of executors may lie, and what taking over from an earlier agent bears."""

import asyncio
import logging
import stat

import pytest

from isthmus.core.errors import FabricError
from isthmus.core.ids import NodeId
from isthmus.core.settings import NodeSettings
from isthmus.node.environments import Environments
from isthmus.node.hosting import Host
from isthmus.node.isolation import Rlimits
from isthmus.node.leases import Allotments, Capacity
from isthmus.node.records import Records
from isthmus.node.socket_paths import make_private
from isthmus.node.zygotes import Zygotes


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


class _Unswept(Rlimits):
    def sweep(self):
        raise PermissionError("somebody else's")


def test_what_others_left_and_cannot_be_removed_stops_no_agent(tmp_path, caplog):
    isolation = _Unswept("tag")
    host = Host(
        NodeSettings(), NodeId("n1"), "", Allotments(Capacity(cores=(0,), memory_bytes=2**30)), isolation,
        Records(tmp_path), Zygotes("auto", tmp_path / "log", isolation), Environments(tmp_path / "cache"),
        lambda message: None,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        asyncio.run(host.adopt())
    assert "cannot be removed: somebody else's" in caplog.text
