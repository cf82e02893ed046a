"""The `isthmus` command line: all commands, their exit codes, and how failures are told.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the site is not running, 4 no such thing, 130 stopped by
Ctrl-C.

Modules of commands import only the standard library and typer; what costs more (rich, the site itself, the
settings) is imported by the command that needs it, so that `isthmus --help` answers at once.
"""

import os
import sys
from typing import Annotated

import typer

from isthmus.cli import (
    calls,
    configuration,
    doctors,
    fabrics,
    functions,
    keys,
    leases,
    lending,
    measurements,
    nodes,
    policies,
    running,
    submitting,
    tenants,
)
from isthmus.cli.failures import Failure, exit_code_of
from isthmus.cli.output import printable

EXIT_INTERRUPTED = 130

EPILOGUE = """\b
Start here:
  isthmus up --detach      start a site for this user on this machine
  isthmus status           what it has and what it does
  python my_program.py     isthmus.connect() inside finds it

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 site not running, 4 not found, 130 Ctrl-C."""

app = typer.Typer(
    name="isthmus",
    help="Python functions on leased cores, in microseconds.",
    epilog=EPILOGUE,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

for module in (
    running,
    submitting,
    nodes,
    leases,
    lending,
    functions,
    calls,
    measurements,
    doctors,
    fabrics,
    configuration,
    keys,
    tenants,
    policies,
):
    module.register(app)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from isthmus.core.model import ISTHMUS_VERSION

        typer.echo(ISTHMUS_VERSION)
        raise typer.Exit


def run() -> None:
    """Entry point of the installed command. Ends the process with the exit code."""
    try:
        app(standalone_mode=True)
    except Failure as failure:
        _say(failure.message)
        sys.exit(failure.exit_code)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        exit_code = exit_code_of(error)
        if exit_code is None:
            raise
        _say(str(error))
        sys.exit(exit_code)


def _say(message: str) -> None:
    text = "\n".join(map(printable, message.split("\n")))
    sys.stderr.write(f"isthmus: {text}\n")
