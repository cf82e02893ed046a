"""What the README and the guides show runs as shown, on a real site."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FREE_S_MAX = 60.0  # beyond the life of a lease that nobody gave back
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = [
    pytest.param(match[1], id=f"{name}-{number}")
    for name in ("README.md", "docs/functions.md")
    for number, match in enumerate(BLOCK.finditer((ROOT / name).read_text()))
]


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A site of one's own, as `isthmus up --detach` makes it; `connect()` in the programs finds it."""
    home = tmp_path_factory.mktemp("home")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    environ = {**inherited, "HOME": str(home), "XDG_STATE_HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    run = [sys.executable, "-m", "isthmus"]
    subprocess.run([*run, "up", "--detach"], env=environ, check=True, capture_output=True)
    yield environ
    subprocess.run([*run, "down"], env=environ, check=True, capture_output=True)


def wait_until_free(environ: dict[str, str]) -> None:
    """Until the program before has given everything back: each may want all cores at once."""
    command = [sys.executable, "-m", "isthmus", "status", "--json"]
    deadline_s = time.monotonic() + FREE_S_MAX
    while time.monotonic() < deadline_s:
        done = subprocess.run(command, env=environ, check=True, capture_output=True)
        if json.loads(done.stdout)["cores_leased"] == 0:
            return
    pytest.fail(f"cores are still leased {FREE_S_MAX} s after the program that leased them has ended")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_of_the_documents_runs(program: str, environ: dict[str, str], tmp_path: Path) -> None:
    wait_until_free(environ)
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, file], env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_main_example_finds_what_was_asked_for(environ: dict[str, str]) -> None:
    """A docstring of the corpus, asked for in its own words, must be the best match."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from search_docstrings import read_corpus
    finally:
        sys.path.pop(0)
    text, name = read_corpus(150)[75]
    command = [sys.executable, "search_docstrings.py", "--limit", "150", "--query", text]
    done = subprocess.run(
        command, env=environ, cwd=ROOT / "examples", capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    best = done.stdout.split(f"{text}?")[1].splitlines()[1].split()
    assert best[1] == name
    assert float(best[0]) > 0.99
    assert "core-seconds" in done.stdout
