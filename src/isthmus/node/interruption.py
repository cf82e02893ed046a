"""How a running call is stopped from outside.

A CANCEL frame or the client's end of file raises a signal in the executor; the handler runs in the main
thread, between two steps of the user's code, and raises `CallInterrupted` right there. It derives from
BaseException, so that `except Exception` in a function does not swallow it, while `finally` and `with` blocks
do run.
Not here: when the signal is heeded (`serving.py`).
"""

from typing import Literal

from isthmus.core.errors import CallCancelledError, CallError, CallTimeoutError

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
