"""Build the C++ tests with sanitizers and run them. Skips, with the reason, where nothing can be built."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
BUILD_S = 180.0


def _missing() -> str:
    """Why the tests cannot be built here; empty when they can."""
    if not any(shutil.which(name, path=TOOLS) for name in ("c++", "g++", "clang++")):
        return "no C++ compiler here"
    if shutil.which("cmake", path=TOOLS) is None or shutil.which("ninja", path=TOOLS) is None:
        return "no cmake and ninja here"
    return "" if find_spec("libucx") else "no UCX headers here (pip install libucx-cu12)"


@pytest.mark.timeout(400)
@pytest.mark.skipif(bool(_missing()), reason=_missing() or "buildable")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_the_native_library_is_clean_under(sanitizers: str) -> None:
    build = ROOT / "build" / f"test-{sanitizers.replace(',', '-')}"  # kept: a second run builds nothing
    _run(
        "cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DISTHMUS_TESTS=ON",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DISTHMUS_SANITIZE={sanitizers}",
        f"-DPython_EXECUTABLE={sys.executable}",
    )  # fmt: skip
    _run("cmake", "--build", build)
    _run("ctest", "--test-dir", build, "--output-on-failure")


def _run(*command: str | Path) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": TOOLS},
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    )
