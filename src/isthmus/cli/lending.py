"""Command: lend."""

import os
import subprocess
import time
from pathlib import Path
from typing import Annotated

import typer

from isthmus.cli.failures import EXIT_NOT_RUNNING, Failure
from isthmus.cli.options import Json, State
from isthmus.cli.output import print_json

JOIN_S = 30.0  # for the agent to start and dial in
_LOOK_S = 0.05


def register(app: typer.Typer) -> None:
    app.command()(lend)


def lend(
    cores: Annotated[str, typer.Option(help="Lend at most so many of the job's cores; auto: all.")] = "auto",
    memory: Annotated[str, typer.Option(help="So much of its memory, like 4GiB; auto: all.")] = "auto",
    stay: Annotated[
        bool, typer.Option("--stay", help="Lend until this command ends, not the script that typed it.")
    ] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Lend what this Slurm job leaves idle to your own site.

    \b
    Typed inside a batch script, before its real work. Harvested functions then run on the job's
    idle cores, at idle class: the job has them back within microseconds when it wants them. They
    end with the script.

    \b
      isthmus lend                                             in the script, on its first node
      srun --overlap --ntasks-per-node=1 isthmus lend --stay & on every node of the job
    """
    from isthmus.core import discovery, settings
    from isthmus.node import lending, owners

    loaded = settings.load()
    try:
        lent = owners.lent_by(os.environ, cores, memory)
    except ValueError as error:
        raise Failure(str(error)) from error
    directory = (state or loaded.state_path).absolute()
    site = discovery.announced_site(directory)
    if site is None:
        raise Failure(f"no site of yours runs in {directory}; `isthmus up` starts one", EXIT_NOT_RUNNING)
    environ = lending.environment(os.environ, _join_key(directory), lent, loaded.node)
    agent_state = lending.make_state(lent)
    command = lending.command(lent, site.url, agent_state, 0 if stay else os.getppid())
    if stay:
        os.execve(command[0], command, environ)
    _start(command, environ, agent_state)
    if as_json:
        print_json({"node": lending.node_name(lent), "cores": lent.cores, "site": site.url})
    else:
        typer.echo(
            f"job {lent.job} lends up to {lent.cores} cores of {lent.node} to {site.url} while they idle"
        )


def _join_key(directory: Path) -> bytes:
    try:
        return bytes.fromhex((directory / "join.key").read_text("ascii"))
    except (OSError, ValueError) as error:
        raise Failure(f"{error}; only the user who runs the site can lend to it") from error


def _start(command: list[str], environ: dict[str, str], state: Path) -> None:
    """Returns when the agent has dialled in. Raises Failure with its last words when it does not."""
    from isthmus.node import lending

    with open(state / "agent.out", "w+b") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            start_new_session=True,
        )
        give_up_s = time.monotonic() + JOIN_S
        while not (state / lending.JOINED_FILE).exists():
            if process.poll() is not None or time.monotonic() > give_up_s:
                process.kill()
                output.seek(0)
                words = output.read().decode(errors="replace").strip().splitlines()
                raise Failure(
                    f"the agent did not reach the site: {words[-1] if words else 'see ' + str(state)}"
                )
            time.sleep(_LOOK_S)
    process.returncode = 0  # it lives on: no warning about a child that nobody waited for
