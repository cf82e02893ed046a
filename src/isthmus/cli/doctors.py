"""Command: doctor."""

import typer

from isthmus.cli.failures import EXIT_FAILED
from isthmus.cli.options import Json
from isthmus.cli.output import show


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: Json = False) -> None:
    """Say what is missing to draw leases from Slurm here.

    Each line: good, poor (it works, at a cost), or bad (nothing works without it), and what it costs.

    \b
      isthmus doctor
      isthmus doctor --json | jq '.[] | select(.verdict != "good")'
    """
    import asyncio

    import msgspec

    from isthmus.core import settings
    from isthmus.fabric import report
    from isthmus.platforms.slurm import open_client
    from isthmus.platforms.slurm.checks import Check, examine

    async def look() -> list[Check]:
        loaded = settings.load().slurm
        client = open_client(loaded)
        try:
            return await examine(loaded, client)
        finally:
            await client.close()

    checks = asyncio.run(look())
    first_line = report.render(report.report()).splitlines()[0]
    checks.append(Check(subject="fabric", verdict="good", words=first_line))
    columns = [
        ("WHAT", lambda row: row["subject"]),
        ("VERDICT", lambda row: row["verdict"]),
        ("MEANING", lambda row: row["words"]),
    ]
    show(msgspec.to_builtins(checks), as_json, columns, "")
    if any(check.verdict == "bad" for check in checks):
        raise typer.Exit(EXIT_FAILED)
