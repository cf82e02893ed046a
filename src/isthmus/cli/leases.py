"""Commands: leases, release, explain, logs, usage."""

import sys
import time
from typing import Annotated, Any

import typer

from isthmus.cli.options import Json, State
from isthmus.cli.output import age, print_json, printable, show, steerless
from isthmus.cli.pools import pool_words
from isthmus.cli.sites import Site, open_site

FOLLOW_PERIOD_S = 0.5

Lease = Annotated[str, typer.Argument(help="A lease's id, as `isthmus leases` shows it (ls_...).")]


def register(app: typer.Typer) -> None:
    app.command()(leases)
    app.command()(release)
    app.command()(explain)
    app.command()(logs)
    app.command()(usage)


def leases(
    ended: Annotated[bool, typer.Option("--ended", help="Also those of the past.")] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """List your leases.

    Who holds which cores, since when, and why the past ones ended.

    \b
      isthmus leases
      isthmus leases --ended
    """
    document = open_site(state).get("leases", **({"ended": 1} if ended else {}))
    show(
        document,
        as_json,
        [
            ("LEASE", lambda row: row["lease"]),
            ("TENANT", lambda row: row["tenant"]),
            ("STATE", _state),
            ("CLASS", lambda row: row["lease_class"]),
            ("NODE", lambda row: row["node"] or "-"),
            ("CORES", lambda row: row["resources"]["cores"]),
            ("MEMORY", lambda row: row["resources"]["memory"]),
            ("CALLS", lambda row: row["usage"]["calls"]),
            ("CREATED", lambda row: age(row["created_s"])),
        ],
        "no leases; a program's first call makes one",
    )


def _state(row: dict[str, Any]) -> str:
    return f"{row['state']}: {row['end_reason']}" if row["end_reason"] else str(row["state"])


def release(lease: Lease, state: State = None, as_json: Json = False) -> None:
    """End a lease and all that runs under it.

    \b
      isthmus release ls_01jh2k3m4n5p6q7r
    """
    document = open_site(state).delete("leases", lease)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{document['lease']} {_state(document)}")


def explain(
    id: Annotated[str, typer.Argument(help="A lease (ls_...), a request (rq_...), or a pool's name.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Tell why a lease was granted or not, or why a pool of allocations has no more.

    The rules that fired, the nodes weighed with their scores, and what happened since.

    \b
      isthmus explain ls_01jh2k3m4n5p6q7r
      isthmus explain burst             a pool of slurm.pools: what its jobs wait for
    """
    site = open_site(state)
    pools = [] if id.startswith(("ls_", "rq_")) else site.get("status")["pools"]
    found = next(({**pool, "words": pool_words(pool)} for pool in pools if pool["pool"] == id), None)
    document = found or site.get("explain", id)
    if as_json:
        print_json(document)
        return
    for line in document["words"]:
        typer.echo(printable(line))


def logs(
    lease: Lease,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the lease ends.")] = False,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Print what functions wrote under a lease.

    Their stdout and stderr, mixed as they came. Nodes keep the newest of it after the lease ends.

    \b
      isthmus logs ls_01jh2k3m4n5p6q7r
      isthmus logs -f ls_01jh2k3m4n5p6q7r
    With --json: one JSON line per chunk.
    """
    site, offset = open_site(state), 0
    while True:
        offset, ended, moved = _print_chunk(site, lease, offset, as_json)
        if moved:
            continue
        if ended or not follow:
            return
        time.sleep(FOLLOW_PERIOD_S)


def _print_chunk(site: Site, lease: str, offset: int, as_json: bool) -> tuple[int, bool, bool]:
    chunk = site.get("logs", lease, offset=offset)
    moved = chunk["next_offset"] > offset
    if as_json and moved:
        print_json(chunk)
    else:
        text = "" if as_json else chunk["text"]
        sys.stdout.write(steerless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
    return chunk["next_offset"], chunk["ended"], moved


def usage(state: State = None, as_json: Json = False) -> None:
    """Show the bill: what your leases used.

    In core-seconds, by class of lease; and its price, where the site has some (leasing.prices).

    \b
      isthmus usage
    allocated: cores held x time; busy: inside functions; spin: polling for the next call; and held: what else
    there was, x time.
    """
    rows = open_site(state).get("usage")
    price = [("PRICE", lambda row: f"{row['price']:.4f} {printable(row['currency'])}".rstrip())]
    show(
        rows,
        as_json,
        [
            ("CLASS", lambda row: row["lease_class"]),
            ("LEASES", lambda row: row["leases"]),
            ("CALLS", lambda row: row["calls"]),
            ("ALLOCATED core-s", lambda row: f"{row['allocated_core_s']:.2f}"),
            ("BUSY core-s", lambda row: f"{row['busy_core_s']:.2f}"),
            ("SPIN core-s", lambda row: f"{row['spin_core_s']:.2f}"),
            ("CPU s", lambda row: f"{row['cpu_s']:.2f}"),
            ("AND HELD", _further),
            *(price if any(row["price"] for row in rows) else []),
        ],
        "nothing was used yet",
    )


def _further(row: dict[str, Any]) -> str:
    """`7200 'matlab' licences x s`"""
    from isthmus.core import kinds

    held = row["amount_s"].items()
    return (
        ", ".join(f"{kinds.number(kind, amount_s)} {kinds.noun(kind)} x s" for kind, amount_s in held) or "-"
    )
