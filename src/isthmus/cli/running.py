"""Commands: up, down, status."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from isthmus.cli.failures import EXIT_FAILED, EXIT_NOT_RUNNING, Failure
from isthmus.cli.options import Json, State
from isthmus.cli.output import print_json, show_fields
from isthmus.cli.pools import pool_words
from isthmus.cli.sites import open_site

if TYPE_CHECKING:
    from isthmus.core.api import SiteFile

READY_TIMEOUT_S = 40.0
DOWN_TIMEOUT_S = 30.0
FULL_BYTES = 2**16  # free space with which no site starts
_POLL_S = 0.02


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)
    app.command()(status)


def up(
    state: State = None,
    port: Annotated[
        int | None, typer.Option(help="Port of REST on this machine; 0: any free one.", min=0, max=65535)
    ] = None,
    platform: Annotated[
        str | None, typer.Option(help="Where leases are drawn from: local or slurm.", metavar="NAME")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the site is ready.")] = False,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Remove the state directory at the end.")
    ] = False,
    parent: Annotated[int, typer.Option(help="Stop when this process is gone.", metavar="PID")] = 0,
    ready_fd: Annotated[
        int,
        typer.Option(
            "--ready-fd", help="Write site.json's line to this descriptor when ready.", metavar="FD"
        ),
    ] = -1,
    as_json: Json = False,
) -> None:
    """Start a site on this machine.

    \b
    It leases the cores of this machine to functions, keeps its books in the state directory, and
    listens on loopback unless gateway.host says otherwise. Programs of the same user find it by themselves.

    \b
      isthmus up              in the foreground, until Ctrl-C
      isthmus up --detach     in the background; stop it with `isthmus down`
      isthmus up --platform slurm   lease cores of a Slurm cluster (see docs/slurm.md)
    """
    from isthmus.core import settings as settings_module

    settings = settings_module.load()
    state = (state or settings.state_path).absolute()
    if platform not in (None, "local", "slurm"):
        raise Failure(f"no platform {platform!r}; there are local and slurm")
    if detach:
        _up_detached(state, port, platform, as_json)
        return
    import msgspec

    from isthmus.gateway.site import SiteOptions, run

    if port is not None:
        gateway = msgspec.structs.replace(settings.gateway, port=port)
        settings = msgspec.structs.replace(settings, gateway=gateway)
    settings = msgspec.structs.replace(settings, platform=platform or settings.platform)
    options = SiteOptions(state=state, ephemeral=ephemeral, parent=parent)
    run(settings, options, partial(_tell_ready, ready_fd, as_json))


def _tell_ready(ready_fd: int, as_json: bool, site: "SiteFile") -> None:
    """One line of JSON to who asked for it, else words to the person at the terminal."""
    import msgspec

    if ready_fd >= 0:
        with os.fdopen(ready_fd, "wb") as pipe:
            pipe.write(msgspec.json.encode(site) + b"\n")
    elif as_json:
        print_json(msgspec.to_builtins(site))
    else:
        typer.echo(f"site ready at {site.url} (pid {site.pid}); stop it with Ctrl-C")
    sys.stdout.flush()


def _up_detached(state: Path, port: int | None, platform: str | None, as_json: bool) -> None:
    site = _start(state, port, platform)
    if as_json:
        print_json(site)
    else:
        ready = f"site ready at {site['url']} (pid {site['pid']}), state in {state}"
        typer.echo(f"{ready}; stop it with `isthmus down --state {quote(str(state))}`")


def _start(state: Path, port: int | None, platform: str | None) -> dict[str, Any]:
    """Start the site in a session of its own; its SiteFile when it is ready. Raises Failure with its last
    words.
    """
    import json

    ready, told = os.pipe()
    command = [sys.executable, "-m", "isthmus", "up", "--state", str(state), "--ready-fd", str(told)]
    command += [] if port is None else ["--port", str(port)]
    command += [] if platform is None else ["--platform", platform]
    with _open_output(state) as output, open(ready, "rb") as ready_pipe:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=[told],
        )
        try:
            os.close(told)
            line = ready_pipe.readline()  # end of file when it died
        except KeyboardInterrupt:  # the site has a session of its own, where Ctrl-C does not arrive
            process.terminate()
            process.wait(DOWN_TIMEOUT_S)
            raise
        if not line:
            process.wait(READY_TIMEOUT_S)
            output.seek(0)
            words = output.read().decode(errors="replace").strip().splitlines()
            raise Failure(words[-1].removeprefix("isthmus: ") if words else _silent_end(state, process))
    process.returncode = 0  # it lives on: no warning about a child that nobody waited for
    site: dict[str, Any] = json.loads(line)
    return site


def _open_output(state: Path) -> BinaryIO:
    try:
        (state / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
        return open(state / "logs" / "site.out", "w+b")
    except OSError as error:
        raise Failure(
            f"cannot use {state} as state directory: {error.strerror}; name another with --state"
        ) from error


def _silent_end(state: Path, process: "subprocess.Popen[bytes]") -> str:
    """Its words go to a file in the state directory, so that a full disk swallows them."""
    import shutil

    if shutil.disk_usage(state).free < FULL_BYTES:
        return f"the disk of {state} is full: free some space, or name another directory with --state"
    return f"the site ended without a word ({process.returncode}); start it without --detach to see more"


def down(state: State = None, as_json: Json = False) -> None:
    """Stop the site that runs here.

    Its leases end in order, and nothing of it is left running. Of a site that was killed, the agent and its
    executors are still there: they end too.

    \b
      isthmus down
    """
    from isthmus.core import discovery, settings
    from isthmus.gateway import state_directory
    from isthmus.platforms.local import running_agent

    path = (state or settings.load().state_path).absolute()
    site = discovery.read_site(path)
    pid = site.pid if site is not None else state_directory.holder(path)
    agent = running_agent(path)
    if not pid and agent is None:
        raise Failure(f"no site is running in {path}", EXIT_NOT_RUNNING)
    if pid:
        _end(pid, f"site {pid}", path)
    if agent is not None and running_agent(path) == agent:
        _end(agent.pid, f"the agent {agent.pid} of a site that was killed", path)
    if as_json:
        url = site.url if site is not None else ""
        print_json({"stopped": True, "pid": pid or (agent.pid if agent else 0), "url": url})
    elif pid:
        typer.echo(f"site{f' at {site.url}' if site else ''} (pid {pid}) stopped")
    elif agent is not None:
        typer.echo(f"the site had died; its agent (pid {agent.pid}) and what that ran are stopped")


def _end(pid: int, name: str, path: Path) -> None:
    """SIGTERM, and until it is gone. Raises Failure when that takes too long."""
    from isthmus.core.discovery import is_alive

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    give_up_s = time.monotonic() + DOWN_TIMEOUT_S
    while is_alive(pid):
        if time.monotonic() > give_up_s:
            raise Failure(f"{name} did not stop in {DOWN_TIMEOUT_S:.0f} s; see {path}/logs", EXIT_FAILED)
        time.sleep(_POLL_S)


def status(state: State = None, as_json: Json = False) -> None:
    """Show the site, its load, and who you are.

    \b
      isthmus status
      isthmus status --json | jq .cores_leased
    """
    from isthmus.core.units import format_seconds

    answer = open_site(state).get("status")
    show_fields(
        answer,
        as_json,
        [
            ("site", f"{answer['url']} (pid {answer['pid']}, isthmus {answer['version']})"),
            ("platform", answer["platform"]),
            ("up", format_seconds(answer["uptime_s"])),
            ("nodes", answer["nodes"]),
            ("cores", f"{answer['cores_leased']} of {answer['cores']} leased"),
            ("leases", f"{answer['leases_active']} active, {answer['requests_waiting']} requests waiting"),
            *((f"pool {row['pool']}", "; ".join(pool_words(row))) for row in answer["pools"]),
            ("you", f"{answer['role']} of tenant {answer['tenant']}"),
        ],
    )
