"""Run one subject as a process of its own, within a time limit, and clean up whatever it leaves.

Invariant: when `run_subject` returns or raises, no process that the subject started is left, nor its
temporary files; what had to be killed or removed is reported as litter, never passed over.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_SHUTDOWN_S = 10.0
_SETTLE_S = 5.0
_STDERR_LINES = 12


class SubjectFailedError(RuntimeError):
    """A subject ended without an answer: its exit code or time limit, and the end of what it wrote."""


@dataclass(frozen=True)
class Answer:
    """What one subject measured in one round. samples: by cell name."""

    subject: str
    samples: dict[str, list[float]]
    notes: tuple[str, ...]
    versions: dict[str, str]
    seconds: float
    litter: tuple[str, ...]


@dataclass(frozen=True)
class Subject:
    """A module under `benchmarks` and the interpreter that runs it."""

    name: str
    module: str
    python: Path
    limit_s: float


def become_reaper(becomes: bool = True) -> None:
    """From now on orphans of our subjects become our children, so that none can hide (prctl(2)); or no
    more.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(becomes), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def run_subject(subject: Subject, arguments: Sequence[str]) -> Answer:
    """Raises SubjectFailedError."""
    start_s = time.monotonic()
    shared_before = _shared_memory()
    strangers = frozenset(descendants(os.getpid()))  # whoever calls us may have children of its own
    folder = tempfile.mkdtemp(prefix="ib-")  # short: Ray puts Unix sockets below it
    try:
        stdout = _communicate(subject, arguments, folder, strangers)
    finally:
        litter = _reap(strangers, _SETTLE_S) + _remove_shared_memory(shared_before)
        shutil.rmtree(folder, ignore_errors=True)
    answer = json.loads(stdout)
    return Answer(
        subject=subject.name,
        samples=answer["samples"],
        notes=tuple(answer["notes"]),
        versions=answer["versions"],
        seconds=time.monotonic() - start_s,
        litter=tuple(litter),
    )


def _communicate(subject: Subject, arguments: Sequence[str], folder: str, strangers: frozenset[int]) -> str:
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = subprocess.Popen(
            [subject.python, "-P", "-m", subject.module, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
            cwd=folder, env=_environment(folder), start_new_session=True,
        )  # fmt: skip
        try:
            stdout, _ = process.communicate(timeout=subject.limit_s)
        except subprocess.TimeoutExpired:
            _stop(process, strangers)
            raise SubjectFailedError(
                f"{subject.name}: no answer within {subject.limit_s:.0f} s{_tail(stderr)}"
            ) from None
        except BaseException:
            _stop(process, strangers)
            raise
        if process.returncode != 0 or not stdout:
            raise SubjectFailedError(f"{subject.name}: exit code {process.returncode}{_tail(stderr)}")
        return stdout


def _environment(folder: str) -> dict[str, str]:
    """Ours without settings of isthmus, with everything that is written going below `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    homes = {f"XDG_{name}_HOME": f"{folder}/{name.lower()}" for name in ("STATE", "CACHE", "CONFIG", "DATA")}
    return kept | homes | {"TMPDIR": folder, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def _stop(process: subprocess.Popen[str], strangers: frozenset[int]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=_SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        _reap(strangers, patience_s=0.0)
        process.communicate()


def _tail(stderr: "tempfile._TemporaryFileWrapper[str]") -> str:
    stderr.seek(0)
    lines = stderr.read().splitlines()[-_STDERR_LINES:]
    return "".join(f"\n    {line}" for line in lines)


def _reap(strangers: frozenset[int], patience_s: float) -> list[str]:
    """Wait for what the subject started to end, then kill what did not; gives the names of the killed."""

    def left_over() -> list[int]:
        return [process for process in descendants(os.getpid()) if process not in strangers]

    patient_until_s = time.monotonic() + patience_s
    while (alive := left_over()) and time.monotonic() < patient_until_s:
        _collect_exited()
        time.sleep(0.02)
    names = [f"process {_command(process_id)}" for process_id in alive]
    hopeless_s = time.monotonic() + _SHUTDOWN_S
    while alive and time.monotonic() < hopeless_s:
        for process_id in alive:
            with suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)
        _collect_exited()
        time.sleep(0.02)
        alive = left_over()
    return names


def _collect_exited() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def descendants(process_id: int) -> list[int]:
    """Living processes (no zombies) below this one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found, frontier = [], [process_id]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def _command(process_id: int) -> str:
    try:
        words = Path(f"/proc/{process_id}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return str(process_id)
    return " ".join(words)[:80].strip()


def _shared_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("*"))


def _remove_shared_memory(before: set[Path]) -> list[str]:
    """Files that appeared below /dev/shm, belong to nobody who still runs, and are ours to remove."""
    litter = []
    for path in _shared_memory() - before:
        with suppress(OSError):
            if path.is_file() and path.stat().st_uid == os.getuid() and not _mapped(path):
                path.unlink()
                litter.append(f"file {path}")
    return litter


def _mapped(path: Path) -> bool:
    """Whether any process has the file mapped or open."""

    def holds(folder: Path) -> bool:
        with suppress(OSError):
            if str(path) in (folder / "maps").read_text("utf-8", "replace"):
                return True
        with suppress(OSError):
            return any(os.readlink(link) == str(path) for link in (folder / "fd").iterdir())
        return False

    return any(holds(folder) for folder in Path("/proc").glob("[0-9]*"))


Runner = Callable[[Subject, Sequence[str]], Answer]
