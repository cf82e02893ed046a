"""Command: fabric."""

import typer

from isthmus.cli.options import Json
from isthmus.cli.output import print_json


def register(app: typer.Typer) -> None:
    app.command()(fabric)


def fabric(as_json: Json = False) -> None:
    """Show the data plane of this machine.

    Which library, transports and devices calls would use. Without UCX the plain-Python fabric is used: the
    same behaviour, slower.

    \b
      isthmus fabric
    """
    import msgspec

    from isthmus.fabric import report

    made = report.report()
    if as_json:
        print_json(msgspec.to_builtins(made))
    else:
        typer.echo(report.render(made))
