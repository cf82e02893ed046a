"""Start an agent that lends what the batch job around it leaves idle: what to run, and in which environment.

Not here: what the agent then does (`agent.py`, `harvesting.py`).
"""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from isthmus.core.errors import SettingsError
from isthmus.core.ids import NodeId
from isthmus.core.settings import NodeSettings
from isthmus.node.launching import agent_url, agent_words, job_holder, lent_name, secrets
from isthmus.node.owners import LENT, Lent

LOCK_FILE = "agent.lock"
JOINED_FILE = "joined"  # in the agent's directory, once it has reached the site
DIRECTORY_PREFIX = "isthmus-lent-"
_NEW_S = 60.0  # its agent may not have started yet


def node_name(lent: Lent) -> NodeId:
    """The name under which a site knows what a job lends of one node."""
    return NodeId(lent_name(lent.node, lent.job))


def command(lent: Lent, site_url: str, state: Path, parent: int) -> list[str]:
    """parent: the process with which the lending ends; 0: none, the batch system ends it."""
    words = agent_words("", agent_url(site_url))
    words += ["--node", node_name(lent), "--state", str(state)]
    words += ["--lend-cores", str(lent.cores), "--lend-memory", str(lent.memory_bytes)]
    return words + (["--parent", str(parent)] if parent else [])


def environment(
    environ: Mapping[str, str], join_key: bytes, lent: Lent, settings: NodeSettings
) -> dict[str, str]:
    return {**environ, LENT: "1", **secrets(join_key, job_holder(lent.job), settings)}


def make_state(lent: Lent) -> Path:
    """A directory for an agent on this node, which removes it."""
    return Path(tempfile.mkdtemp(prefix=f"{DIRECTORY_PREFIX}{lent.job}-"))


def enter_state(state: Path) -> None:
    """Make this directory of an agent that lends, or take over what a killed one left there; what killed ones
    left in others goes. Raises SettingsError: its name can be guessed, and another user may have made it.
    """
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = state.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise SettingsError(f"{state} is not a directory of ours alone; remove it, or set another TMPDIR")
        os.utime(state)  # no other agent takes it for abandoned before we hold its lock
    except OSError as error:
        raise SettingsError(f"the agent's directory cannot be made: {error}") from error
    for left in state.parent.glob(f"{DIRECTORY_PREFIX}*"):
        if left != state and _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)


def _is_abandoned(state: Path) -> bool:
    """Ours, not new, and no agent holds it."""
    try:
        status = state.stat()
        if status.st_uid != os.getuid() or time.time() - status.st_mtime < _NEW_S:
            return False
        with (state / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
