"""Turn an Environment into an interpreter that can run a zygote: the agent's own, a named one, or a cached
venv.

A venv is named by its Environment's id, built in a draft directory under a lock and renamed into place, so
that a directory of that name is always complete. isthmus and what it needs come from the agent's own site-
packages, which a .pth file puts last on the path: the function's requirements win.
"""

import asyncio
import fcntl
import os
import shutil
import sysconfig
from pathlib import Path
from typing import IO

import msgspec

import isthmus.core
from isthmus.core.errors import FunctionLoadError
from isthmus.core.model import Environment, python_version
from isthmus.node.zygotes import default_python

BUILD_S = 900.0  # pip may have to compile
PROBE_S = 30.0
_SAID_LINES = 15  # of pip's output in the error
_SAID_BYTES = 16 * 2**10  # ... and of each command's output in memory
_PTH_FILE = "zzz-isthmus.pth"
_PROBE = "import sys; v = sys.version_info; print(f'{sys.implementation.name}-{v.major}.{v.minor}')"


def shared(environment: Environment) -> Environment:
    """The part that must be there before the fork: environments that agree in it share a zygote.

    Import directories can be added after the fork, unless a preload needs them.
    """
    python = "" if environment.python == default_python() else environment.python
    sys_path = environment.sys_path if environment.preload else ()
    return msgspec.structs.replace(environment, python=python, sys_path=sys_path)


class Environments:
    """The venvs in one cache directory; several agents may share it."""

    def __init__(self, cache: Path) -> None:
        self._root = cache / "environments"
        self._checked: set[str] = set()

    async def python(self, environment: Environment) -> str:
        """Path of the interpreter, built if need be. Raises FunctionLoadError with what went wrong."""
        base = environment.python or default_python()
        if environment.python:
            await self._check_version(base)
        if not environment.requirements:
            return base
        path = self._root / environment.id
        python = path / "bin" / "python"
        if not python.exists():
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._root / f"{environment.id}.lock").open("w") as lock:
                await asyncio.to_thread(_lock, lock)
                if not python.exists():
                    await self._build(path, base, environment)
        return str(python)

    async def _check_version(self, python: str) -> None:
        """Code cannot be exchanged between two Python versions: refuse before anything is sent."""
        if python in self._checked:
            return
        status, said = await _run([python, "-c", _PROBE], PROBE_S)
        if status != 0:
            raise FunctionLoadError(f"{python} is no usable Python: {said}")
        if said.strip() != python_version():
            raise FunctionLoadError(
                f"{python} is {said.strip()}, this node's agent is {python_version()}; "
                "name an interpreter of equal version"
            )
        self._checked.add(python)

    async def _build(self, path: Path, base: str, environment: Environment) -> None:
        draft = path.with_suffix(".draft")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            pip = await _make_venv(base, draft)
            _link_isthmus(draft)
            await _step([*pip, *environment.requirements], "pip cannot install the requirements")
            draft.rename(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


async def _make_venv(base: str, draft: Path) -> list[str]:
    """An empty venv, and the command that installs into it: the base's own pip where there is one, saving
    the seconds that a pip inside the venv takes to set up.
    """
    failure = "the virtual environment cannot be made"
    options = ["install", "--no-input", "--quiet", "--disable-pip-version-check", "--no-warn-script-location"]
    python = str(draft / "bin" / "python")
    status, _ = await _run([base, "-c", "import pip"], PROBE_S)
    if status == 0:
        await _step([base, "-m", "venv", "--without-pip", str(draft)], failure)
        return [base, "-m", "pip", "--python", python, *options]
    await _step([base, "-m", "venv", str(draft)], failure)
    return [python, "-m", "pip", *options]


async def _step(command: list[str], failure: str) -> None:
    status, said = await _run(command, BUILD_S)
    if status != 0:
        tail = "\n".join(said.strip().splitlines()[-_SAID_LINES:])
        raise FunctionLoadError(f"{failure} (status {status}):\n{tail}")


async def _run(command: list[str], limit_s: float) -> tuple[int, str]:
    """Exit status and output; the process does not outlive this call."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        raise FunctionLoadError(f"{command[0]} cannot be run: {error}") from error
    try:
        async with asyncio.timeout(limit_s):
            said = await _tail(process)
            await process.wait()
    except TimeoutError as error:
        raise FunctionLoadError(f"{' '.join(command[:4])} took longer than {limit_s:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode("utf-8", "replace")


async def _tail(process: asyncio.subprocess.Process) -> bytes:
    """The end of what it says: a build runs anybody's code, which may say more than memory holds."""
    assert process.stdout is not None
    said = b""
    while piece := await process.stdout.read(_SAID_BYTES):
        said = (said + piece)[-_SAID_BYTES:]
    return said


def _link_isthmus(venv: Path) -> None:
    """Make the agent's isthmus and its dependencies importable, after the venv's own packages."""
    own = Path(isthmus.core.__file__).parents[2]
    paths = dict.fromkeys([str(own), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    for site_packages in venv.glob("lib/python*/site-packages"):
        (site_packages / _PTH_FILE).write_text("".join(f"{path}\n" for path in paths))


def _lock(lock: IO[str]) -> None:
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.utime(lock.fileno())
