"""Commands: tenant list|quota."""

from typing import Annotated, Any

import typer

from isthmus.cli.options import Json, State, parse_counts
from isthmus.cli.output import printable, show, show_fields
from isthmus.cli.sites import open_site

tenant = typer.Typer(
    help="Tenants: fair share and quotas.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)


def register(app: typer.Typer) -> None:
    app.add_typer(tenant, name="tenant")


@tenant.command("list")
def list_tenants(state: State = None, as_json: Json = False) -> None:
    """Show where tenants stand by fair share: the lowest level is served first.

    \b
      isthmus tenant list
    """
    show(
        open_site(state).get("shares"),
        as_json,
        [
            ("TENANT", lambda row: row["standing"]["tenant"]),
            ("LEVEL", lambda row: f"{row['standing']['level']:.4f}"),
            ("HOLDS", lambda row: f"{row['standing']['held']:.2%} of {row['standing']['dominant']}"),
            ("USED LATELY", lambda row: f"{row['standing']['used']:.2%}"),
            ("WEIGHT", lambda row: f"{row['standing']['weight']:g}"),
            ("PRIORITY", lambda row: row["priority"]),
            ("CORES", lambda row: row["held"]["cores"]),
            ("LEASES", lambda row: row["held"]["leases"]),
            ("GUARANTEED", lambda row: row["guarantee_cores"] or "-"),
        ],
        "no tenant holds or used anything",
    )


@tenant.command()
def quota(
    name: Annotated[str, typer.Argument(help="The tenant.")],
    cores: Annotated[int | None, typer.Option(help="Cores at once; 0: no limit.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory at once, like 64GiB; 0: no limit.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs at once; 0: no limit.")] = None,
    leases: Annotated[int | None, typer.Option(help="Leases at once; 0: no limit.")] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Bandwidth at once, over all nodes, like 20Gbit/s; 0: no limit.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Cache at once, over all nodes, like 2TiB; 0: no limit.")
    ] = None,
    license: Annotated[
        list[str] | None,
        typer.Option(help="Licences at once, like matlab=2; 0: no limit. Repeat for others."),
    ] = None,
    core_hours: Annotated[
        float | None, typer.Option(help="Core-hours within any window; 0: no limit.")
    ] = None,
    window_h: Annotated[int | None, typer.Option(help="Length of that window in hours.")] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Show what a tenant may hold and use, or change what is named.

    \b
      isthmus tenant quota physics
      isthmus tenant quota physics --cores 64 --core-hours 500 --window-h 24
    """
    from isthmus.core.units import format_bytes, format_rate, parse_bytes, parse_rate

    site = open_site(state)
    document = site.get("tenants", name)
    asked: dict[str, Any] = {
        "cores": cores,
        "memory_bytes": None if memory is None else parse_bytes(int(memory) if memory.isdigit() else memory),
        "gpus": gpus,
        "leases": leases,
        "core_hours": core_hours,
        "window_h": window_h,
        "bandwidth": bandwidth,
        "cache": cache,
    }
    if license:
        named = parse_counts(license)
        asked["licenses"] = {
            name: count for name, count in {**document["licenses"], **named}.items() if count
        }
    changes = {field: value for field, value in asked.items() if value is not None}
    if changes:
        document = site.put("tenants", name, body={**document, **changes})
        if not as_json and not any(row["tenant"] == name and not row["revoked"] for row in site.get("keys")):
            typer.echo(printable(f"note: nobody has a key of tenant {name!r}; is that its name?"), err=True)
    memory_bytes, rate = document["memory_bytes"], parse_rate(document["bandwidth"])
    cache_bytes = parse_bytes(document["cache"])
    show_fields(
        document,
        as_json,
        [
            ("cores", document["cores"] or "no limit"),
            ("memory", format_bytes(memory_bytes) if memory_bytes else "no limit"),
            ("gpus", document["gpus"] or "no limit"),
            ("leases", document["leases"] or "no limit"),
            ("bandwidth", format_rate(rate) if rate else "no limit"),
            ("cache", format_bytes(cache_bytes) if cache_bytes else "no limit"),
            ("licences", ", ".join(f"{k}={v}" for k, v in document["licenses"].items()) or "no limit"),
            ("core-hours", _budget(document["core_hours"], document["window_h"])),
        ],
    )


def _budget(core_hours: float, window_h: int) -> str:
    return f"{core_hours:g} within any {window_h} h" if core_hours else "no limit"
