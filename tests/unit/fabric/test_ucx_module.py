"""The boundary between Python and C++: the same header on both sides, and a stub that tells the truth."""

import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.fabric import frames

_ucx = pytest.importorskip("isthmus.fabric._ucx", reason="the native fabric is not built here")
STUB = Path(frames.__file__).with_name("_ucx.pyi")


def test_the_header_is_laid_out_as_frames_says() -> None:
    documented = {
        words[2]: int(words[0])
        for line in (frames.__doc__ or "").splitlines()
        if len(words := line.split()) >= 3 and words[0].isdigit() and words[1].isdigit()
    }
    native = dict(_ucx.frame_offsets())
    assert native.pop("end") == frames.HEADER_BYTES
    assert native == documented


def test_the_stub_matches_the_module(tmp_path: Path) -> None:
    fresh = tmp_path / "_ucx.pyi"
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-P", "-q", "-m", "isthmus.fabric._ucx", "-o", fresh],
        check=True,
    )
    assert STUB.read_text() == fresh.read_text(), (
        "regenerate it: python -m nanobind.stubgen -P (tools/build-native.sh)"
    )
