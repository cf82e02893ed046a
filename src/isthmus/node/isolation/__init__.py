"""Enforcing a lease with what the machine has; `choose` says what that is, and why not more."""

import hashlib
import os
from pathlib import Path

from isthmus.core.errors import SettingsError
from isthmus.node.isolation.caching import Cached, cache_of
from isthmus.node.isolation.cgroup_v1 import CgroupV1
from isthmus.node.isolation.cgroup_v2 import CgroupV2
from isthmus.node.isolation.isolation import Consumption, Isolation, Share, reserve_name
from isthmus.node.isolation.rlimits import Rlimits
from isthmus.node.isolation.shaping import Shaped
from isthmus.node.isolation.systemd import SystemdScope

__all__ = [
    "Cached", "CgroupV1", "CgroupV2", "Consumption", "Isolation", "Rlimits", "Shaped", "Share",
    "SystemdScope", "cache_of", "cached", "choose", "reserve_name", "shaped", "state_tag",
]  # fmt: skip

_STRONGEST_FIRST = (CgroupV2, CgroupV1, SystemdScope, Rlimits)


def choose(setting: str, tag: str) -> tuple[Isolation, str]:
    """The strongest mechanism that works here, and one line that says why none stronger does.

    setting  NodeSettings.isolation: `auto`, or the one to use
    raises   SettingsError when the named one does not work here
    """
    weaker_than: list[str] = []
    for kind in _STRONGEST_FIRST:
        if setting not in ("auto", kind.mechanism):
            continue
        isolation: Isolation = kind(tag)
        reason = isolation.probe()
        if not reason:
            return isolation, "; ".join(weaker_than)
        weaker_than.append(f"{kind.mechanism}: {reason}")
    raise SettingsError(f"node.isolation = {setting!r} does not work here: {'; '.join(weaker_than)}")


def shaped(isolation: Isolation, interface: str, tag: str) -> tuple[Isolation, str]:
    """The same with bandwidth held too, or the same, and why not."""
    if not interface:
        return isolation, "bandwidth: node.interface names none to hold it at"
    both = Shaped(isolation, interface, tag)
    reason = both.probe()
    return (isolation, f"bandwidth: {reason}") if reason else (both, "")


def cached(isolation: Isolation, path: Path, state: Path) -> tuple[Isolation, str]:
    """The same with a directory for each lease that holds cache, and why its size is not limited.

    Raises SettingsError where nothing can be kept in `path`.
    """
    both = Cached(isolation, path, state, state_tag(state))
    reason = both.probe()
    return both, f"cache: {reason}" if reason else ""


def state_tag(state: Path) -> str:
    """Names what this state directory's agents make, so that they clear away only their own remains."""
    return hashlib.blake2b(os.fsencode(state.resolve()), digest_size=4).hexdigest()
