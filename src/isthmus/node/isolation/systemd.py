"""Plain users under systemd: ask the user's own manager for a delegated scope, then work in it as cgroup v2.

The scope holds the agent and everything it starts. systemd removes it when the last process of it is gone.
Source: systemd's CGROUP_DELEGATION and the StartTransientUnit call of org.freedesktop.systemd1.
"""

import os
import shutil
import subprocess

from isthmus.core.model import Enforcement
from isthmus.node.isolation.cgroup_v2 import CgroupV2

_ANSWER_S = 3.0


class SystemdScope(CgroupV2):
    enforcement = Enforcement(cores="cpuset", memory="cgroup", mechanism="systemd")
    mechanism = "systemd"

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self._scope = f"isthmus-{tag}-{os.getpid()}.scope"

    def probe(self) -> str:
        if shutil.which("busctl") is None:
            return "busctl is not installed"
        if not os.environ.get("XDG_RUNTIME_DIR"):
            return "no user session: XDG_RUNTIME_DIR is not set"
        reason = self._enter_scope()
        if reason:
            return reason
        super().__init__(self._scope.removeprefix("isthmus-").removesuffix(".scope"))
        return super().probe()

    def _enter_scope(self) -> str:
        """Move this process into a new delegated scope; "" when it is there."""
        unit = ["ssa(sv)a(sa(sv))", self._scope, "fail", "2", "PIDs", "au", "1", str(os.getpid())]
        call = ["org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"]
        command = [
            "busctl",
            "--user",
            "call",
            *call,
            "StartTransientUnit",
            *unit,
            "Delegate",
            "b",
            "true",
            "0",
        ]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the user's systemd does not answer: {error}"
        return f"the user's systemd refuses a scope: {answer.stderr.strip()}" if answer.returncode else ""
