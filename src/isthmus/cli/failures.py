"""What a failed command says, and its exit code."""

EXIT_FAILED = 1
EXIT_NOT_RUNNING = 3
EXIT_NOT_FOUND = 4

_EXIT_CODES = {"SiteUnavailableError": EXIT_NOT_RUNNING, "NotFoundError": EXIT_NOT_FOUND}


class Failure(Exception):
    """One clear line on stderr that says what to do next, and an exit code."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def failure_of(code: str, message: str) -> Failure:
    """A failure that the site reported; `code` is a class name in core.errors."""
    return Failure(message, _EXIT_CODES.get(code, EXIT_FAILED))


def exit_code_of(error: Exception) -> int | None:
    """The exit code of one of our own errors; None for anything else, which is a bug and deserves its
    traceback.
    """
    from isthmus.core.errors import IsthmusError

    return _EXIT_CODES.get(type(error).__name__, EXIT_FAILED) if isinstance(error, IsthmusError) else None
