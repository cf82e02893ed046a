"""Command: fabric."""

import importlib
from typing import Any

import typer

from isthmus.cli.failures import Failure
from isthmus.cli.options import Json
from isthmus.cli.output import print_json


def register(app: typer.Typer) -> None:
    app.command()(fabric)


def fabric(as_json: Json = False) -> None:
    """Show the data plane of this machine.

    Which library, transports and devices calls would use.

    \b
      isthmus fabric
    Without UCX the plain-Python fabric is used: the same behaviour, slower.
    """
    try:
        report = importlib.import_module("isthmus.fabric.report")
    except ImportError as error:
        raise Failure(f"no fabric report here ({error}); the plain-Python fabric is used") from error
    made = report.report()
    if as_json:
        print_json(_plain(made))
    else:
        typer.echo(report.render(made))


def _plain(made: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(made)
