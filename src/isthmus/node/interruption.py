"""How a running call is stopped from outside.

A CANCEL frame or the client's end of file raises a signal in the executor; the handler runs in the main
thread, between two steps of the user's code, and raises `CallInterrupted` right there. It derives from
BaseException, so that `except Exception` in a function does not swallow it, while `finally` and `with` blocks
do run.
Not here: when the signal is heeded (`serving.py`).
"""

import math
import time
from collections import OrderedDict
from typing import Literal

from isthmus.core.errors import CallCancelledError, CallError, CallTimeoutError

CANCELS_MAX = 4096  # beyond it the oldest is forgotten: its call runs, and its client ignores the answer
_OVERTAKEN_S = 2.0  # how far a CANCEL may be ahead of its CALL

Reason = Literal["cancel", "timeout", "gone"]


class CallInterrupted(BaseException):
    """Raised in the user's code; never leaves the executor."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Terminated(BaseException):
    """SIGTERM while a function runs: its `finally` blocks get the grace that remains."""


def reason_of(meta: bytes) -> Reason:
    """What the meta of a CANCEL frame asks for."""
    return "timeout" if meta == b"timeout" else "cancel"


def answer(reason: Reason, running: bool) -> CallError:
    """The error that the interrupted call's future gets."""
    where = "while it ran; the function may have run in part" if running else "before it ran"
    if reason == "timeout":
        return CallTimeoutError(f"the call's timeout_s passed {where}")
    return CallCancelledError(f"the call was cancelled {where}")


class Cancels:
    """Cancels and deadlines of calls that do not run yet.

    A CANCEL is urgent and may overtake its CALL; or the CALL was answered already, and nobody will ever ask.
    So one whose call is not known to be queued is kept for a while only.

    calls  (channel, call) -> (why it must not run, until when to keep that) or (None, when its deadline is);
           empty nearly always, which is all that the path of a call looks at
    """

    def __init__(self) -> None:
        self.calls: OrderedDict[tuple[int, int], tuple[Reason | None, float]] = OrderedDict()

    def queue(self, channel_id: int, call_id: int, deadline_ns: int) -> None:
        """A call with a deadline waits. What is known of it already stays: its deadline, or its CANCEL."""
        self.calls.setdefault((channel_id, call_id), (None, time.monotonic() + deadline_ns / 1e9))

    def put(self, channel_id: int, call_id: int, reason: Reason, queued: bool) -> None:
        until_s = math.inf if queued else time.monotonic() + _OVERTAKEN_S
        self.calls[channel_id, call_id] = reason, until_s
        if len(self.calls) > CANCELS_MAX:
            self.calls.popitem(last=False)

    def take(self, channel_id: int, call_id: int) -> Reason | None:
        """Why this call must not run, if so; forgets what is too old."""
        reason, until_s = self.calls.pop((channel_id, call_id), (None, math.inf))
        now_s = time.monotonic()
        if reason is None and until_s < now_s:
            reason = "timeout"
        for key in [key for key, (why, until_s) in self.calls.items() if why is not None and until_s < now_s]:
            del self.calls[key]
        return reason

    def forget(self, channel_id: int) -> None:
        for key in [key for key in self.calls if key[0] == channel_id]:
            del self.calls[key]
