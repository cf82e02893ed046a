"""Commands: calls, cancel (durable calls)."""

from typing import Annotated

import typer

from isthmus.cli.options import Json, State
from isthmus.cli.output import age, print_json, show
from isthmus.cli.sites import open_site


def register(app: typer.Typer) -> None:
    app.command()(calls)
    app.command()(cancel)


def calls(state: State = None, as_json: Json = False) -> None:
    """List your durable calls.

    They survive their client and the site, and run at least once with one recorded result.

    \b
      isthmus calls
    A program makes one with site.submit(function, ..., durable=True) and reads it with site.result(call).
    """
    show(
        open_site(state).get("calls"),
        as_json,
        [
            ("CALL", lambda row: row["call"]),
            ("FUNCTION", lambda row: row["function"]),
            ("STATE", lambda row: row["state"]),
            ("ATTEMPTS", lambda row: row["attempts"]),
            ("CREATED", lambda row: age(row["created_s"])),
            ("DETAIL", lambda row: row["detail"]),
        ],
        "no durable calls; make one with site.submit(function, ..., durable=True)",
    )


def cancel(
    call: Annotated[str, typer.Argument(help="A durable call's id, as `isthmus calls` shows it.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Cancel a durable call, queued or running.

    \b
      isthmus cancel call_01jh2k3m4n5p6q7r
    """
    document = open_site(state).delete("calls", call)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{document['call']} {document['state']}")
