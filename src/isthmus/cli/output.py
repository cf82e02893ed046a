"""Print documents for programs and tables for people."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer

PIPED_COLUMNS = 200  # wide enough that nothing is folded for `grep`

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_CONTROL_BUT_COLOUR = re.compile(r"(?!\x1b\[[\d;]*m)[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], object]]


def printable(value: object) -> str:
    """Text of others - names, labels, reasons - on one line, and unable to steer the terminal."""
    return _CONTROL.sub(_escape, str(value))


def steerless(output: str) -> str:
    """A function's output with its lines and colours, but without the terminal's other commands."""
    return _CONTROL_BUT_COLOUR.sub(_escape, output)


def _escape(control: re.Match[str]) -> str:
    return control[0].encode("unicode_escape").decode("ascii")


def print_json(document: object) -> None:
    """One document on one line: programs read it, and so does `jq`."""
    typer.echo(json.dumps(document, separators=(",", ":")))


def show(document: Any, as_json: bool, columns: Sequence[Column], empty: str) -> None:
    """A list of rows as JSON or as a table; `empty` says what to do when there is none."""
    if as_json:
        print_json(document)
    elif not document:
        typer.echo(empty)
    else:
        _print_table(document, columns)


def show_fields(document: Row, as_json: bool, fields: Iterable[tuple[str, object]]) -> None:
    """One thing as JSON or as `name  value` lines."""
    if as_json:
        print_json(document)
        return
    lines = [(name, printable(value)) for name, value in fields]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name:<{width}}  {value}")


def _print_table(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title, _ in columns:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(value_of(row))) for _, value_of in columns))
    Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS).print(table)


def age(since_s: float) -> str:
    """How long ago, in words; nothing for a time that never came."""
    from isthmus.core.units import format_seconds

    return format_seconds(max(time.time() - since_s, 0.0)) + " ago" if since_s else "-"
