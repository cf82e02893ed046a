"""Virtual environments of the peers, built once under `.peers/`.

Invariant: only an environment that carries the mark of a finished installation is used, and its name carries
a hash of its pinned requirements, so that a changed pin builds anew.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.running import ROOT

REQUIREMENTS = ROOT / "benchmarks" / "peers"
_ENVIRONMENTS = ROOT / ".peers"
_COMPLETE = "complete"
_INSTALL_S = 900.0


class EnvironmentFailedError(RuntimeError):
    """A peer's packages could not be installed; says why, in pip's last words."""


def python_of(name: str, progress: Callable[[str], None]) -> Path:
    """The interpreter of the environment of `peers/NAME.txt`; builds it if need be. Raises
    EnvironmentFailedError.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()[:8]
    folder = _ENVIRONMENTS / f"{name}-{digest}"
    if not (folder / _COMPLETE).exists():
        progress(
            f"installing {' '.join(requirements.read_text('utf-8').split())} into {folder.relative_to(ROOT)}"
        )
        _build(folder, requirements)
    return folder / "bin" / "python"


def _build(folder: Path, requirements: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
          "-r", str(requirements)])  # fmt: skip
    (folder / _COMPLETE).touch()


def _run(command: list[str]) -> None:
    answer = subprocess.run(
        ["nice", "-n", "10", *command], capture_output=True, text=True, timeout=_INSTALL_S
    )
    if answer.returncode != 0:
        raise EnvironmentFailedError(f"{' '.join(command)}: {answer.stderr.strip()[-500:]}")
