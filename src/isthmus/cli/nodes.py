"""Commands: nodes, licenses, drain, resume."""

from typing import Annotated, Any

import typer

from isthmus.cli.options import Json, State
from isthmus.cli.output import show
from isthmus.cli.sites import open_site

Node = Annotated[str, typer.Argument(help="A node's name, as `isthmus nodes` shows it.")]


def register(app: typer.Typer) -> None:
    app.command()(nodes)
    app.command()(licenses)
    app.command()(drain)
    app.command()(resume)


def nodes(state: State = None, as_json: Json = False) -> None:
    """List machines that can host leases.

    The last columns say what really holds the limits of a lease there.

    \b
      isthmus nodes
    """
    _show(open_site(state).get("nodes"), as_json)


def licenses(state: State = None, as_json: Json = False) -> None:
    """List licences: how many there are, and who has them.

    A function that needs some says so: Resources(licenses={"matlab": 1}).

    \b
      isthmus licenses
    """
    show(
        open_site(state).get("licenses"),
        as_json,
        [
            ("LICENCE", lambda row: row["name"]),
            ("TOTAL", lambda row: row["total"]),
            ("HELD", lambda row: row["held"]),
            ("BY OTHERS", lambda row: row["others"]),
            ("FREE", lambda row: row["free"]),
        ],
        "no licences; name some in [leasing.licenses], or have Slurm count them",
    )


def drain(node: Node, state: State = None, as_json: Json = False) -> None:
    """Give a node no new leases.

    Elastic leases it has end in order; reserved ones stay until their owners end them.

    \b
      isthmus drain node7      before maintenance; undo with `isthmus resume node7`
    """
    _show(open_site(state).post("nodes", node, "drain"), as_json)


def resume(node: Node, state: State = None, as_json: Json = False) -> None:
    """Give a drained node leases again.

    \b
      isthmus resume node7
    """
    _show(open_site(state).post("nodes", node, "resume"), as_json)


def _show(document: list[dict[str, Any]], as_json: bool) -> None:
    from isthmus.core.units import format_bytes

    show(
        document,
        as_json,
        [
            ("NODE", lambda row: row["node"]),
            ("AGENT", lambda row: _why_draining(row) if row["draining"] else row["agent"]),
            ("CORES", lambda row: row["cores"]),
            ("MEMORY", lambda row: format_bytes(row["memory_bytes"])),
            ("GPUS", lambda row: row["gpus"]),
            ("CORES HELD BY", lambda row: row["enforcement"]["cores"]),
            ("MEMORY HELD BY", lambda row: row["enforcement"]["memory"]),
            ("AND, HELD BY", _further),
        ],
        "no nodes yet; the agent may still be starting",
    )


def _why_draining(row: dict[str, Any]) -> str:
    return f"draining ({row['draining_why']})" if row["draining_why"] else "draining"


def _further(row: dict[str, Any]) -> str:
    """`10 Gbit/s of bandwidth: tc-htb`"""
    from isthmus.core import kinds

    held = row["enforcement"]["amounts"]
    words = (
        f"{kinds.number(kind, amount)} {kinds.noun(kind)}: {held.get(kind, 'accounted-only')}"
        for kind, amount in row["amounts"].items()
    )
    return ", ".join(words) or "-"
