"""Options that many commands share, said once."""

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
