"""A few seconds of coverage-guided fuzzing per reader, where atheris is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import targets

SECONDS = 2
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed: pip install atheris"
)
@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.__name__)
def test_guided_bytes_find_no_other_error(target: object, tmp_path: Path) -> None:
    name = target.__name__  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "tests.fuzz.atheris_readers", name, str(SECONDS)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(ROOT / "src")}
    )
    assert done.returncode == 0, done.stderr[-3000:]
