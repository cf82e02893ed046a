"""Make `joblib.parallel_config("isthmus")` work after `import isthmus`, whichever of the two is imported
first.

Invariant: joblib is never imported from here. Where it is loaded already its table of external backends gets
our row; else a finder waits for it and goes away once it came.
Not here: the backend (`joblib_backend.py`).
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AWAITED = "joblib.parallel"


def install() -> None:
    loaded = sys.modules.get(_AWAITED)
    if loaded is not None:
        _announce(loaded)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds joblib.parallel once, through the ordinary finder, to be told when it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """The module's own loader, followed by `_announce`."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _announce(module)


def _announce(parallel: ModuleType) -> None:
    """Older versions of joblib have no such table; there, importing the backend module registers it."""
    table = getattr(parallel, "EXTERNAL_BACKENDS", None)
    if table is not None:
        table["isthmus"] = _register


def _register() -> None:
    from isthmus.sdk import joblib_backend

    joblib_backend.register()
