"""Run the `isthmus` command inside the test's process: as by hand, without starting an interpreter."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from isthmus.cli.main import run


class Said(NamedTuple):
    code: int
    words: str
    complaint: str


def commander(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], home: Path
) -> Callable[..., Said]:
    """A function that runs a command for a user whose home is `home`; keywords are environment variables."""

    def command(*arguments: str, input: str = "", **environment: str) -> Said:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "ISTHMUS_STATE", "ISTHMUS_CONFIG"):
                patch.delenv(name, raising=False)
            for name, value in {"HOME": str(home), **environment}.items():
                patch.setenv(name, value)
            patch.setattr("sys.argv", ["isthmus", *arguments])
            patch.setattr("sys.stdin", io.StringIO(input))
            with pytest.raises(SystemExit) as ended:
                run()
        words, complaint = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Said(ended.value.code, words, complaint)

    return command
