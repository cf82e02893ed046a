"""Commands: policy show|check|dry-run|replay."""

from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cli.failures import Failure
from isthmus.cli.options import Json, State
from isthmus.cli.output import print_json, printable, show
from isthmus.cli.sites import open_site

policy = typer.Typer(
    help="Rules that decide on leases.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)

File = Annotated[Path, typer.Argument(help="A TOML file of [[rule]] tables.", exists=True, dir_okay=False)]
_COLUMNS = [
    ("RULE", lambda row: row["name"]),
    ("WHEN", lambda row: row["when"]),
    ("THEN", lambda row: row["then"]),
    ("PRIORITY", lambda row: row["priority"]),
]


def register(app: typer.Typer) -> None:
    app.add_typer(policy, name="policy")


@policy.command("show")
def show_rules(state: State = None, as_json: Json = False) -> None:
    """Show the rules the site decides by, in the order in which they are tried.

    \b
      isthmus policy show
    """
    document = open_site(state).get("policy")
    show(
        document if as_json else document["rules"],
        as_json,
        _COLUMNS,
        "no rules: everything that fits is allowed",
    )


@policy.command()
def check(file: File, as_json: Json = False) -> None:
    """Check a policy file without a site: a bad rule is refused with its line.

    \b
      isthmus policy check policy.toml
    """
    from isthmus.policy import load_policies

    rules = load_policies(_read(file), str(file)).rules
    if as_json:
        print_json({"file": str(file), "rules": [rule.name for rule in rules]})
    else:
        typer.echo(f"{file}: {len(rules)} rules, all fine")


@policy.command("dry-run")
def dry_run(
    file: Annotated[
        Path | None,
        typer.Argument(help="Decide by this file instead of the site's rules.", exists=True, dir_okay=False),
    ] = None,
    cores: Annotated[int, typer.Option(help="Cores asked for.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory asked for.")] = "1GiB",
    gpus: Annotated[int, typer.Option(help="GPUs asked for.")] = 0,
    count: Annotated[int, typer.Option(help="Leases asked for.")] = 1,
    lease_class: Annotated[str, typer.Option("--class", help="reserved, elastic or harvested.")] = "elastic",
    pool: Annotated[str, typer.Option(help="Pool asked from.")] = "default",
    state: State = None,
    as_json: Json = False,
) -> None:
    """Tell what a request would get now, without making a lease.

    \b
      isthmus policy dry-run --cores 4 --memory 8GiB
      isthmus policy dry-run new-policy.toml --cores 4
    """
    lease = {
        "resources": {"cores": cores, "memory": memory, "gpus": gpus},
        "lease_class": lease_class,
        "count": count,
        "pool": pool,
    }
    body = {"lease": lease, "policy": None if file is None else _read(file)}
    document = open_site(state).post("policy", "dry-run", body=body)
    if as_json:
        print_json(document)
        return
    for line in document["words"]:
        typer.echo(printable(line))


@policy.command()
def replay(file: File, state: State = None, as_json: Json = False) -> None:
    """Decide the site's logged requests again by other rules: what would have changed?

    \b
      isthmus policy replay new-policy.toml
    """
    document = open_site(state).post("policy", "replay", body={"policy": _read(file)})
    if as_json:
        print_json(document)
        return
    changes: list[dict[str, Any]] = document["changes"]
    typer.echo(f"{document['judged']} decisions judged, {len(changes)} would be different")
    for change in changes:
        before, after = change["before"], change["after"]
        request = change["demand"]["request"]
        typer.echo(printable(f"  {request}: {before['outcome']} -> {after['outcome']}  {after['reason']}"))


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file}: {error}") from error
