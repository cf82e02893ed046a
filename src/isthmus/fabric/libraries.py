"""Find UCX on this machine and load it once per process.

The site's own library is preferred, because it has the site's transports (RDMA above all); the wheel
`libucx-cu12` is the fallback. Invariants: at most one UCX per process; a library older than 1.13 is never
loaded, since its sonames would then stand in the way of a newer one. Not here: what it can do (`report.py`).
"""

import contextlib
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from isthmus.core.errors import FabricError

VERSION_MIN = (1, 13)
_SONAME = "libucp.so.0"
_VERSION = re.compile(rb"(?<![\d.])(\d+)\.(\d+)\.(\d+)\x00")

# For variables that are unset: no signal handlers (Python's own are in charge), no chatter, and no door
# besides ours. UCX's TCP listens on every network and asks nobody for a token; its System V segments are open
# to the user's whole group. Peers that nothing else reaches get a channel of plain sockets.
_DEFAULTS = {
    "UCX_TLS": "^tcp,sysv",
    "UCX_ERROR_SIGNALS": "",
    "UCX_HANDLE_ERRORS": "none",
    "UCX_DEBUG_SIGNO": "0",
    "UCX_LOG_LEVEL": "fatal",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}


class Library(NamedTuple):
    """`source`: `named` (by ISTHMUS_UCX_LIBRARY or the caller), `site` (where the loader looks), `wheel`."""

    path: str
    version: str
    source: str


_loaded: Library | None = None


def load(named: str = "", environ: Mapping[str, str] = os.environ) -> Library:
    """The UCX of this process, loaded now if it was not yet. Raises FabricError that says what was tried."""
    global _loaded
    if _loaded is None:
        from isthmus.fabric import _ucx  # absent where the package was built without UCX headers

        tried = []
        for path, source in candidates(named, environ):
            try:
                with defaults():
                    real_path, version = _ucx.load(path)
            except RuntimeError as error:
                tried.append(f"{path}: {error}")
                continue
            _loaded = Library(real_path, version, source)
            return _loaded
        raise FabricError(f"no usable UCX ({'; '.join(tried) or 'none found'}); pip install libucx-cu12")
    return _loaded


def candidates(named: str = "", environ: Mapping[str, str] = os.environ) -> Iterator[tuple[str, str]]:
    """(path, source) of every library worth loading, best first. A named one is the only one."""
    named = named or environ.get("ISTHMUS_UCX_LIBRARY", "")
    if named:
        yield named, "named"
        return
    for directory in _loader_directories(environ):
        path = directory / _SONAME
        version = read_version(path)
        if version is not None and version >= VERSION_MIN:
            yield str(path), "site"
    spec = find_spec("libucx")
    if spec is not None and spec.origin is not None:
        yield str(Path(spec.origin).parent / "lib" / _SONAME), "wheel"


def read_version(path: Path) -> tuple[int, ...] | None:
    """The version that a libucp file carries in its text, without loading it; None when there is none."""
    try:
        found = _VERSION.search(path.read_bytes())
    except OSError:
        return None
    return tuple(int(part) for part in found.groups()) if found else None


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """UCX reads its settings from the environment: ours, where the site set none, while it reads."""
    missing = [name for name in _DEFAULTS if name not in os.environ]
    os.environ.update((name, _DEFAULTS[name]) for name in missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


def _loader_directories(environ: Mapping[str, str]) -> Iterator[Path]:
    """Where the dynamic loader looks, in its order, each once."""
    names = [name for name in environ.get("LD_LIBRARY_PATH", "").split(":") if name]
    for file in sorted(Path("/etc/ld.so.conf.d").glob("*.conf")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            names += [line for line in file.read_text("utf-8").split() if line.startswith("/")]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    names += [f"/lib/{multiarch}", f"/usr/lib/{multiarch}"] if multiarch else []
    names += ["/lib64", "/usr/lib64", "/lib", "/usr/lib"]
    yield from dict.fromkeys(Path(name) for name in names)
