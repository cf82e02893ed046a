"""Command: sbatch."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.cli.failures import EXIT_FAILED, Failure
from isthmus.cli.options import Json, State
from isthmus.cli.output import print_json

if TYPE_CHECKING:
    from isthmus.platforms.slurm.directives import Lend

# Of sbatch(1): options that take no value, or one only after `=`. All others are followed by theirs.
ALONE_SHORT = frozenset("HhkOQsvVW")
ALONE_LONG = frozenset(
    ("contiguous", "exclusive", "get-user-env", "help", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue",
     "overcommit", "oversubscribe", "parsable", "propagate", "quiet", "reboot", "requeue", "spread-job",
     "test-only", "usage", "use-min-nodes", "verbose", "version", "wait")
)  # fmt: skip


def register(app: typer.Typer) -> None:
    settings = {
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],
    }
    app.command(context_settings=settings)(sbatch)


def sbatch(
    words: Annotated[list[str], typer.Argument(help="sbatch's options, the script, and its arguments.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be submitted and lent, and stop.")
    ] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Submit a batch script after a look at its `#ISTHMUS` lines.

    \b
    The script goes to sbatch as it is, with all options. When the job runs, your site on this
    cluster (`isthmus up --platform slurm`) sees the line, and the job lends what it leaves idle.
    Plain sbatch does the same; but this finds mistakes before the job waits in the queue.

    \b
      #ISTHMUS lend cores=auto memory=4GiB       in the script, beside its #SBATCH lines
      isthmus sbatch -p batch job.sh --its arguments
      isthmus sbatch --dry-run job.sh
    """
    script = Path(words[script_place(words)])
    lend = _lend_of(script)
    command = ["sbatch", *words]
    if lend is not None and not _slurm_site(state):
        typer.echo("isthmus: no site of yours draws on Slurm now; the job lends once one does", err=True)
    if dry_run:
        _show(command, script, lend, as_json)
        return
    if shutil.which("sbatch") is None:
        raise Failure("sbatch is not on PATH; go to a login node")
    if not as_json:
        os.execvp("sbatch", command)
    done = subprocess.run(["sbatch", "--parsable", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    print_json({"job": _submitted(done.stdout), "script": str(script), "lend": _plain(lend)})


def _submitted(printed: str) -> int:
    """Raises Failure."""
    from isthmus.platforms.slurm.parsing import SlurmOutputError, submitted

    try:
        return submitted(printed)
    except SlurmOutputError as error:
        raise Failure(f"{error}; `squeue --me` tells whether the job was submitted all the same") from error


def script_place(words: Sequence[str]) -> int:
    """Where the script stands among sbatch's words. Raises Failure."""
    is_value = False
    for place, word in enumerate(words):
        if is_value:
            is_value = False
        elif word.startswith("--"):
            name, has_value, _ = word[2:].partition("=")
            if name.startswith("wrap"):
                break
            is_value = not has_value and name not in ALONE_LONG
        elif word.startswith("-") and len(word) > 1:
            letters = word[1:].lstrip("".join(ALONE_SHORT))
            is_value = len(letters) == 1
        else:
            return place
    raise Failure("name the script: lines in what is wrapped or piped are not looked at; sbatch takes those")


def _lend_of(script: Path) -> "Lend | None":
    from isthmus.platforms.slurm.directives import DirectiveError, lend_of

    try:
        return lend_of(script.read_text("utf-8", "replace"))
    except OSError as error:
        raise Failure(f"{error.strerror}: {script}") from error
    except DirectiveError as error:
        raise Failure(f"{script}: {error}; nothing was submitted", EXIT_FAILED) from error


def _slurm_site(state: Path | None) -> bool:
    from isthmus.cli.sites import open_site
    from isthmus.core.errors import IsthmusError

    try:
        return bool(open_site(state).get("status")["platform"] == "slurm")
    except (Failure, IsthmusError):
        return False


def _show(command: list[str], script: Path, lend: "Lend | None", as_json: bool) -> None:
    if as_json:
        print_json({"command": command, "script": str(script), "lend": _plain(lend)})
        return
    typer.echo(shlex.join(command))
    if lend is None:
        typer.echo(f"{script}: lends nothing")
    else:
        cores = "all cores" if lend.cores == "auto" else f"{lend.cores} cores"
        memory = "all memory" if lend.memory == "auto" else lend.memory
        typer.echo(f"{script}: line {lend.line}: lends up to {cores} and {memory} while they idle")


def _plain(lend: "Lend | None") -> dict[str, object] | None:
    return None if lend is None else {"line": lend.line, "cores": lend.cores, "memory": lend.memory}
