"""Where the executors of one agent make their shared memory: a directory of their own below /dev/shm.

UCX makes a file and removes its name at once; who is killed in between leaves the file behind, with megabytes
in it. In this directory nothing else lives, so the agent can clear it away without asking whose a file is.
Invariant: what is in it is on its way out, or was left by the dead: living executors need no name here.
"""

import contextlib
import os
import shutil
from pathlib import Path

from isthmus.core.ownership import is_ours

ROOT = Path("/dev/shm")


class SharedMemory:
    """Made, or cleared of what an earlier agent's executors left. Where that cannot be, UCX keeps its own.

    variables  for the environment of executors; what the site has set goes before it
    """

    def __init__(self, tag: str, root: Path = ROOT) -> None:
        self._path = root / f"isthmus-{os.getuid()}-{tag}"
        self.variables: dict[str, str] = {}
        try:
            self._path.mkdir(mode=0o700, exist_ok=True)
            if is_ours(self._path):
                self._clear()
                self.variables["UCX_POSIX_DIR"] = str(self._path)
        except OSError:  # no such root, not writable, a file of that name
            return

    def _clear(self) -> None:
        for left in self._path.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its maker was quicker
                left.unlink()

    def remove(self) -> None:
        if self.variables:
            shutil.rmtree(self._path, ignore_errors=True)
