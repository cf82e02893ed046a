"""Rules of the tree that no linter knows."""

import ast
import importlib
import pkgutil
from pathlib import Path

import isthmus

ROOT = Path(isthmus.__file__).parent
FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


def test_every_name_in_all_exists() -> None:
    for info in pkgutil.walk_packages([str(ROOT)], "isthmus."):
        if info.ispkg:
            module = importlib.import_module(info.name)
            missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
            assert not missing, f"{info.name}.__all__ lists {missing}"


def test_no_module_is_a_drawer_for_leftovers() -> None:
    assert not [path for path in ROOT.rglob("*.py") if path.stem in FORBIDDEN]


def test_package_inits_only_re_export() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr, ast.FunctionDef, ast.If)
    for path in ROOT.rglob("__init__.py"):
        odd = [node for node in ast.parse(path.read_text()).body if not isinstance(node, allowed)]
        assert not odd, f"{path} does more than re-export"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path
        for path in ROOT.rglob("*.py")
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent
