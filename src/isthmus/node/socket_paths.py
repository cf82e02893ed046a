"""Where executors listen on this node: paths short enough for a socket, in directories of ours alone."""

import hashlib
import os
from pathlib import Path

from isthmus.core.errors import FabricError
from isthmus.core.ids import ExecutorId
from isthmus.core.ownership import is_ours

_SOCKET_PATH_MAX = 100  # the kernel's limit is 107


def socket_path(directory: Path, executor: ExecutorId, state: Path) -> Path:
    """In the lease's directory, or in a shorter one when that path is too long for a socket. Raises as
    `make_private`.
    """
    path = directory / f"{executor}.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_MAX:
        return path
    directory = short_directory(state)
    make_private(directory)
    return directory / f"{executor}.sock"


def short_directory(state: Path) -> Path:
    """Where sockets go whose path in the state directory would be too long."""
    digest = hashlib.blake2b(os.fsencode(state.resolve()), digest_size=6).hexdigest()
    return Path("/tmp") / f"isthmus-{os.getuid()}-{digest}"


def make_private(directory: Path) -> None:
    """Raises FabricError when it is not ours alone: anybody may make a directory of this name in /tmp, and
    would then answer in place of our executors.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    if not is_ours(directory):
        raise FabricError(
            f"{directory} is there already and is not this user's alone; remove it, or use a state directory "
            "with a shorter path"
        )
