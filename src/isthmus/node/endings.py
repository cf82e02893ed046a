"""How user code may end other than by returning: exceptions, exits, forked children that come back."""

import os
import sys
from typing import NoReturn

_OWN_FRAMES = ("isthmus.node.", "isthmus.fabric.", "asyncio.")


def trim(error: BaseException) -> None:
    """Drop our own frames from the head of the traceback: the user's code is what the reader looks for."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(_OWN_FRAMES):
        trace = trace.tb_next
    error.__traceback__ = trace


def exit_code(error: SystemExit) -> int:
    """What the interpreter would exit with; prints what it would print."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def end_child() -> NoReturn:
    """End a process that user code forked and that comes back from that code: its parent answers the call."""
    error = sys.exc_info()[1]
    code = 0
    if isinstance(error, SystemExit):
        code = exit_code(error)
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
