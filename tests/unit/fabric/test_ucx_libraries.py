"""Which UCX is taken, and which is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.fabric import libraries
from isthmus.fabric.libraries import candidates, read_version


def _library(directory: Path, version: str) -> str:
    directory.mkdir(parents=True)
    path = directory / "libucp.so.0"
    path.write_bytes(b"\x7fELF" + bytes(100) + f"rev 0.9.9.{version} of\0{version}\0".encode() + bytes(10))
    return str(path)


def test_the_version_is_read_without_loading(tmp_path: Path) -> None:
    _library(tmp_path / "a", "1.17.0")
    assert read_version(tmp_path / "a" / "libucp.so.0") == (1, 17, 0)
    assert read_version(tmp_path / "none" / "libucp.so.0") is None
    (tmp_path / "text").write_text("1.17.0")
    assert read_version(tmp_path / "text") is None


def test_a_named_library_is_the_only_candidate(tmp_path: Path) -> None:
    site = {"LD_LIBRARY_PATH": str(tmp_path)}
    assert list(candidates("/opt/x.so", site)) == [("/opt/x.so", "named")]
    assert list(candidates("", {**site, "ISTHMUS_UCX_LIBRARY": "/opt/y.so"})) == [("/opt/y.so", "named")]


def test_the_sites_library_comes_before_the_wheel_and_an_old_one_not_at_all(tmp_path: Path) -> None:
    _library(tmp_path / "old", "1.12.1")
    new = _library(tmp_path / "new", "1.13.0")
    found = list(candidates("", {"LD_LIBRARY_PATH": f"{tmp_path}/old::{tmp_path}/new"}))
    assert found[0] == (new, "site")
    assert str(tmp_path / "old") not in str(found)
    assert [source for _, source in found if source != "site"] in ([], ["wheel"])


def test_defaults_are_there_only_where_the_site_set_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_LOG_LEVEL", "info")
    monkeypatch.delenv("UCX_HANDLE_ERRORS", raising=False)
    with libraries.defaults():
        assert os.environ["UCX_LOG_LEVEL"] == "info"
        assert os.environ["UCX_HANDLE_ERRORS"] == "none"
    assert os.environ["UCX_LOG_LEVEL"] == "info"
    assert "UCX_HANDLE_ERRORS" not in os.environ


def test_a_useless_library_is_named_with_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("isthmus.fabric._ucx", reason="the native fabric is not built here")
    program = f"from isthmus.fabric import libraries; libraries.load({str(tmp_path / 'nothing.so')!r})"
    # In a process of its own: one that has a UCX already never looks for another.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "FabricError: no usable UCX" in done.stderr
    assert "nothing.so" in done.stderr
