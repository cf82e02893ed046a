"""Whose a directory is. Where all users may write, anybody may have made one before us, under our name."""

import os
import stat
from pathlib import Path


def is_ours(directory: Path, *, alone: bool = True) -> bool:
    """Whether it is a directory, not a link to one, and this user's; `alone`: and closed to all others.

    raises  OSError when it is not there or cannot be looked at
    """
    status = directory.lstat()
    is_open = bool(status.st_mode & 0o077)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not (alone and is_open)
