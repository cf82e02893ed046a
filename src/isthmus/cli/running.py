"""Commands: up, down, status."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

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
_POLL_S = 0.02


def register(app: typer.Typer) -> None:
    app.command()(up)
    app.command()(down)
    app.command()(status)


def up(
    state: State = None,
    port: Annotated[int | None, typer.Option(help="Port of REST on this machine; 0: any free one.")] = None,
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
    (state / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(state / "logs" / "site.out", "w+b") as output, open(ready, "rb") as ready_pipe:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=[told],
        )
        os.close(told)
        line = ready_pipe.readline()  # end of file when it died
        if not line:
            process.wait(READY_TIMEOUT_S)
            output.seek(0)
            words = output.read().decode(errors="replace").strip().splitlines()
            raise Failure(words[-1].removeprefix("isthmus: ") if words else "the site died without a word")
    process.returncode = 0  # it lives on: no warning about a child that nobody waited for
    site: dict[str, Any] = json.loads(line)
    return site


def down(state: State = None, as_json: Json = False) -> None:
    """Stop the site that runs here.

    Its leases end in order, and nothing of it is left running.

    \b
      isthmus down
    """
    from isthmus.core import discovery, settings

    path = (state or settings.load().state_path).absolute()
    site = discovery.read_site(path)
    if site is None:
        raise Failure(f"no site is running in {path}", EXIT_NOT_RUNNING)
    os.kill(site.pid, signal.SIGTERM)
    give_up_s = time.monotonic() + DOWN_TIMEOUT_S
    while discovery.is_alive(site.pid):
        if time.monotonic() > give_up_s:
            raise Failure(
                f"site {site.pid} did not stop in {DOWN_TIMEOUT_S:.0f} s; see {path}/logs/site.log",
                EXIT_FAILED,
            )
        time.sleep(_POLL_S)
    if as_json:
        print_json({"stopped": True, "pid": site.pid, "url": site.url})
    else:
        typer.echo(f"site at {site.url} (pid {site.pid}) stopped")


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
