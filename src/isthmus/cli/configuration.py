"""Command: config."""

from typing import Annotated, Any

import typer

from isthmus.cli.failures import Failure
from isthmus.cli.options import Json
from isthmus.cli.output import print_json, show


def register(app: typer.Typer) -> None:
    app.command()(config)


def config(
    init: Annotated[bool, typer.Option("--init", help="Write a commented settings file and stop.")] = False,
    words: Annotated[bool, typer.Option("--words/--no-words", help="Say what each setting costs.")] = True,
    as_json: Json = False,
) -> None:
    """Show the settings that hold here.

    Where each came from, and what more or less of it costs.

    \b
      isthmus config
      isthmus config --init                        write a settings file with everything commented out
      ISTHMUS_LEASING__LEASE_S=5 isthmus config    any setting can come from the environment
    """
    from isthmus.core.settings_table import table

    if init:
        _init(as_json)
        return
    rows: list[dict[str, Any]] = [setting._asdict() for setting in table()]
    columns = [
        ("SETTING", lambda row: row["path"]),
        ("VALUE", lambda row: row["value"] if row["value"] != "" else "-"),
        ("FROM", lambda row: row["origin"]),
    ]
    for row in rows:
        if row["path"] == "client.api_key" and row["value"]:
            row["value"] = "[redacted]"
    show(rows, as_json, [*columns, ("MEANING", lambda row: row["description"])] if words else columns, "")


def _init(as_json: bool) -> None:
    from isthmus.core.settings import config_path
    from isthmus.core.settings_table import render_toml

    path = config_path()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(render_toml())
    except FileExistsError as error:
        raise Failure(f"{path} exists already; `isthmus config` shows what it sets") from error
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}") from error
    if as_json:
        print_json({"file": str(path)})
    else:
        typer.echo(f"wrote {path}; every setting in it is commented out")
