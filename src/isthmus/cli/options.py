"""Options that many commands share, said once."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs: stable names, one document.")]
State = Annotated[
    Path | None,
    typer.Option(
        "--state", envvar="ISTHMUS_STATE", help="State directory of the site to speak to.", show_default=False
    ),
]


def parse_counts(words: Iterable[str]) -> dict[str, int]:
    """`matlab=2`, ... Raises typer.BadParameter."""
    counts = {}
    for word in words:
        name, _, count = word.rpartition("=")
        if not name or not count.isdecimal():
            raise typer.BadParameter(f"{word!r} is no name with a number; write for example matlab=2")
        counts[name] = int(count)
    return counts
