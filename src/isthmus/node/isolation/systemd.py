"""Plain users under systemd: ask the user's own manager for a delegated scope, then work in it as cgroup v2.

The scope is named for the state directory and holds the agent and everything it starts. It lives as long as
any of them does: an agent that is started again finds its leases in it. systemd removes it with the last
process.
Source: systemd's CGROUP_DELEGATION and the StartTransientUnit and AttachProcessesToUnit calls of
org.freedesktop.systemd1.
"""

import os
import shutil
import subprocess
import time

from isthmus.node.isolation import groups
from isthmus.node.isolation.cgroup_v2 import LEAF, CgroupV2

_ANSWER_S = 3.0
_MANAGER = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")


class SystemdScope(CgroupV2):
    mechanism = "systemd"

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self._scope = f"{self._prefix}agent.scope"

    def probe(self) -> str:
        if shutil.which("busctl") is None:
            return "busctl is not installed"
        if not os.environ.get("XDG_RUNTIME_DIR"):
            return "no user session: XDG_RUNTIME_DIR is not set"
        if not self._is_inside():
            reason = self._enter()
            if reason:
                return reason
        self._base = self._own_base()
        return super().probe()

    def _enter(self) -> str:
        """Move this process into the scope, a new one if need be; "" when it is there."""
        own = str(os.getpid())
        properties = ("2", "PIDs", "au", "1", own, "Delegate", "b", "true")
        refusal = _call("StartTransientUnit", "ssa(sv)a(sa(sv))", self._scope, "fail", *properties, "0")
        if refusal:  # perhaps executors of an earlier agent keep it
            again = ("ssau", self._scope, f"/{self._prefix}{LEAF}", "1", own)
            refusal = _call("AttachProcessesToUnit", *again) and refusal
        return refusal or self._wait()

    def _wait(self) -> str:
        """The manager answers before it has moved us."""
        until_s = time.monotonic() + _ANSWER_S
        while not self._is_inside():
            if time.monotonic() > until_s:
                return f"the user's systemd has not moved this process to {self._scope} in {_ANSWER_S:g} s"
            time.sleep(0.005)
        return ""

    def _is_inside(self) -> bool:
        return self._scope in groups.own_group("").split("/")


def _call(method: str, *arguments: str) -> str:
    """Ask the user's manager; why not, or "" when it is done."""
    command = ["busctl", "--user", "call", *_MANAGER, method, *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the user's systemd does not answer: {error}"
    return f"the user's systemd refuses a scope: {answer.stderr.strip()}" if answer.returncode else ""
