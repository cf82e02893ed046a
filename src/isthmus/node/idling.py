"""Let processes run only where a core would idle: Linux's idle scheduling class, which any user may enter.

The kernel hands the core to whoever else wakes up there within microseconds; nobody has to notice first. What
a process forks or starts later inherits the class. There is no way back without privileges.
Limit: where each session is a scheduling group of its own (autogroup), the class counts only within that
group, so the group's weight is lowered too: to a seventieth of a normal one, not to nothing. A cgroup with
`cpu.idle` (`isolation`) has no such remainder.
Source: sched(7).
"""

import contextlib
import os
from pathlib import Path

_NICE_IDLE = 19
_NICE_MODEST = 10  # a tenth of the weight of a normal process


def make_idle(pid: int) -> None:
    """All threads of a process of ours. One that is gone meanwhile is idle enough."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    _weigh_session(pid, _NICE_IDLE)


def make_modest(pid: int) -> None:
    """For what must come to an end some time, also on cores that are never idle: preparing executors."""
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, pid, _NICE_MODEST)
    _weigh_session(pid, _NICE_MODEST)


def _weigh_session(pid: int, nice: int) -> None:
    with contextlib.suppress(OSError):  # a kernel without autogroups
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))
