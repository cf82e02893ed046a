"""isthmus: Python functions on leased cores in microseconds.

Names are imported when first used, so that `import isthmus` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from isthmus.sdk import joblib_hook

if TYPE_CHECKING:
    from isthmus.core.errors import (
        AuthError,
        CallCancelledError,
        CallError,
        CallTimeoutError,
        CodecError,
        DeniedError,
        EvictedError,
        ExecutorLostError,
        FabricError,
        FrameError,
        FunctionLoadError,
        HandshakeError,
        InvalidRequestError,
        IsthmusError,
        LeaseEndedError,
        MapError,
        MemoryLimitError,
        NoCapacityError,
        NotFoundError,
        PeerLostError,
        PermissionDeniedError,
        PolicyError,
        RemoteError,
        SettingsError,
        SiteUnavailableError,
        TokenError,
    )
    from isthmus.core.model import Environment, LeaseClass, Resources
    from isthmus.sdk.connecting import connect, current_site
    from isthmus.sdk.contexts import Context
    from isthmus.sdk.executor import Executor
    from isthmus.sdk.function import Retry, actor, enter, exit, function, native
    from isthmus.sdk.futures import Future
    from isthmus.sdk.memory import Memory
    from isthmus.sdk.site import Site

__version__ = "0.1.0"

_HOMES = {
    "isthmus.core.errors": (
        "AuthError", "CallCancelledError", "CallError", "CallTimeoutError", "CodecError", "DeniedError",
        "EvictedError", "ExecutorLostError", "FabricError", "FrameError", "FunctionLoadError",
        "HandshakeError", "InvalidRequestError", "IsthmusError", "LeaseEndedError", "MapError",
        "MemoryLimitError",
        "NoCapacityError", "NotFoundError", "PeerLostError", "PermissionDeniedError", "PolicyError",
        "RemoteError", "SettingsError", "SiteUnavailableError", "TokenError",
    ),
    "isthmus.core.model": ("Environment", "LeaseClass", "Resources"),
    "isthmus.sdk.connecting": ("connect", "current_site"),
    "isthmus.sdk.executor": ("Executor",),
    "isthmus.sdk.function": ("Retry", "actor", "enter", "exit", "function", "native"),
    "isthmus.sdk.futures": ("Future",),
    "isthmus.sdk.contexts": ("Context",),
    "isthmus.sdk.memory": ("Memory",),
    "isthmus.sdk.site": ("Site",),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AuthError",
    "CallCancelledError",
    "CallError",
    "CallTimeoutError",
    "CodecError",
    "Context",
    "DeniedError",
    "Environment",
    "EvictedError",
    "Executor",
    "ExecutorLostError",
    "FabricError",
    "FrameError",
    "FunctionLoadError",
    "Future",
    "HandshakeError",
    "InvalidRequestError",
    "IsthmusError",
    "LeaseClass",
    "LeaseEndedError",
    "MapError",
    "Memory",
    "MemoryLimitError",
    "NoCapacityError",
    "NotFoundError",
    "PeerLostError",
    "PermissionDeniedError",
    "PolicyError",
    "RemoteError",
    "Resources",
    "Retry",
    "SettingsError",
    "Site",
    "SiteUnavailableError",
    "TokenError",
    "__version__",
    "actor",
    "connect",
    "current_site",
    "enter",
    "exit",
    "function",
    "native",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


joblib_hook.install()
