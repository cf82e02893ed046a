"""The wheel and the sdist build, install, and work, with and without a compiler's help."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on this machine")
SHIPPED = ("src", "native", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what is shipped, so that a build leaves nothing in the checkout."""
    copy = tmp_path / "tree"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in SHIPPED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    return copy


def build(tree: Path, kind: str, native: str) -> Path:
    """Build in this interpreter's environment (its build tools are installed by tools/setup.sh)."""
    (tree / "dist").mkdir(exist_ok=True)
    code = f"import scikit_build_core.build as b; print(b.build_{kind}('dist'))"
    environ = {
        **os.environ,
        "ISTHMUS_NATIVE": native,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return tree / "dist" / done.stdout.strip().splitlines()[-1]


def run_installed(wheel: Path, target: Path, code: str) -> str:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "-q",
            "install",
            "--no-deps",
            "--target",
            target,
            wheel,
        ],
        check=True,
    )
    environ = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, cwd=target
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHERE_AND_WHAT = (
    "import isthmus, isthmus.fabric as f; d = f.open_domain(); print(isthmus.__file__, d.name); d.close()"
)


@NEEDS_COMPILER
def test_the_wheel_carries_the_native_fabric_and_it_is_the_one_used(tree: Path, tmp_path: Path) -> None:
    wheel = build(tree, "wheel", native="on")
    names = zipfile.ZipFile(wheel).namelist()
    for module in ("_plain", "_ucx"):
        assert any(name.startswith(f"isthmus/fabric/{module}") and name.endswith(".so") for name in names), (
            module
        )
    file, domain = run_installed(wheel, tmp_path / "site", WHERE_AND_WHAT).split()
    assert file.startswith(str(tmp_path))
    assert domain == "ucx"


def test_without_a_compiler_the_wheel_is_pure_python_and_its_fabric_is_the_twin(
    tree: Path, tmp_path: Path
) -> None:
    wheel = build(tree, "wheel", native="off")
    assert wheel.name.endswith("-none-any.whl")
    _, domain = run_installed(wheel, tmp_path / "site", WHERE_AND_WHAT).split()
    assert domain == "sockets"


def test_the_sdist_builds_a_wheel_and_holds_nothing_of_the_checkout(tree: Path, tmp_path: Path) -> None:
    sdist = build(tree, "sdist", native="off")
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert {"LICENSE", "CMakeLists.txt", "native/module.cpp", "src/isthmus/__init__.py"} <= set(names)
    assert not [name for name in names if name.startswith((".venv", "build", "tests", "benchmarks"))]
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert build(unpacked, "wheel", native="off").name.startswith("isthmus-")
