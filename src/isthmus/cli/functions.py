"""Command: functions."""

import typer

from isthmus.cli.options import Json, State
from isthmus.cli.output import age, show
from isthmus.cli.sites import open_site


def register(app: typer.Typer) -> None:
    app.command()(functions)


def functions(state: State = None, as_json: Json = False) -> None:
    """List the functions that ran.

    With their calls, errors and time inside, over all your leases.

    \b
      isthmus functions
      isthmus functions --json | jq -r '.[] | select(.errors > 0) | .name'
    """
    show(
        open_site(state).get("functions"),
        as_json,
        [
            ("FUNCTION", lambda row: row["name"]),
            ("CALLS", lambda row: row["calls"]),
            ("ERRORS", lambda row: row["errors"]),
            ("BUSY s", lambda row: f"{row['busy_s']:.3f}"),
            ("MEAN ms", lambda row: f"{row['busy_s'] / row['calls'] * 1e3:.3f}" if row["calls"] else "-"),
            ("LAST", lambda row: age(row["last_s"])),
        ],
        "no function ran yet; try `isthmus bench`",
    )
