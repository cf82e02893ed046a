"""Find CPython's own tests of `concurrent.futures`, as one namespace.

They come with most interpreters (`python -m test`); Debian keeps them in libpython3.X-testsuite, of the same
minor version. Executors must be able to import them too, so their directory goes on sys.path before a site
is opened.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

_PACKAGE = "test.test_concurrent_futures"
_MODULES = (
    "util",
    "executor",
    "test_as_completed",
    "test_deadlock",
    "test_future",
    "test_init",
    "test_shutdown",
    "test_wait",
)
_DEBIAN = Path(
    f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}/test/test_concurrent_futures.py"
)


def load(scratch: Path) -> tuple[SimpleNamespace, list[object]] | None:
    """Every public name of the tests, and the modules that hold them; None where there are none."""
    try:
        found = importlib.import_module(_PACKAGE)
    except ImportError:
        return _load_debian(scratch)
    if not hasattr(found, "__path__"):
        return SimpleNamespace(**vars(found)), [found]
    modules = [importlib.import_module(f"{_PACKAGE}.{name}") for name in _MODULES]
    names: dict[str, object] = {}
    for module in modules:
        names |= {name: value for name, value in vars(module).items() if not name.startswith("__")}
    return SimpleNamespace(**names), list(modules)


def _load_debian(scratch: Path) -> tuple[SimpleNamespace, list[object]] | None:
    """The file under a name of its own: its directory also holds half a standard library, which must stay
    out.
    """
    if not _DEBIAN.exists():
        return None
    name = "cpython_test_concurrent_futures"
    (scratch / f"{name}.py").symlink_to(_DEBIAN)
    sys.path.append(str(scratch))
    module = importlib.import_module(name)
    return SimpleNamespace(**vars(module)), [module]
