"""Commands: policy show|check|dry-run|replay|diff."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cli.failures import EXIT_FAILED, Failure
from isthmus.cli.options import Json, State, parse_counts
from isthmus.cli.output import print_json, printable, show
from isthmus.cli.sites import open_site

policy = typer.Typer(
    help="Rules that decide on leases.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)

GROUPS_MAX = 20  # of like changes, told to people

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
    """Show the rules the site decides by, in the order in which they are tried, and the signals they read.

    The file is read when the site starts.

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
    if document["outdated"] and not as_json:
        typer.echo(
            printable(
                f"{document['source']} has changed since the site started: it decides by the rules above "
                "until it is started again"
            )
        )
    for name, value in [] if as_json else sorted(document.get("signals", {}).items()):
        typer.echo(f"signal.{printable(name)} is {value:g} now")


@policy.command()
def check(file: File, as_json: Json = False) -> None:
    """Check a policy file without a site: every bad rule is told with its line, a doubtful one pointed out.

    The exit code is 1 when anything is wrong; programs read `errors` of --json.

    \b
      isthmus policy check policy.toml
    """
    from isthmus.policy import advice, examine

    policies, errors = examine(_read(file), str(file))
    lines = [] if errors else advice(policies)
    if as_json:
        rules = [rule.name for rule in policies.rules]
        document = {"file": str(file), "rules": rules, "tenants": list(policies.terms), "advice": lines}
        print_json(document | {"errors": [str(error) for error in errors]})
        raise typer.Exit(EXIT_FAILED if errors else 0)
    for error in errors[:-1]:
        typer.echo(printable(f"isthmus: {error}"), err=True)
    if errors:
        raise Failure(str(errors[-1]))
    typer.echo(f"{file}: {len(policies.rules)} rules, {len(policies.terms)} tenants with terms, all fine")
    for number, rule in enumerate(policies.rules, 1):
        when = "always" if rule.spec.when == "true" else f"when {rule.spec.when}"
        typer.echo(printable(f"  {number}. {rule.name}: {rule.action} {when}"))
    for line in lines:
        typer.echo(printable(f"  note: {line}"))


@policy.command("dry-run")
def dry_run(
    file: Annotated[
        Path | None,
        typer.Argument(help="Decide by this file instead of the site's rules.", exists=True, dir_okay=False),
    ] = None,
    cores: Annotated[int, typer.Option(help="Cores asked for.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory asked for.")] = "1GiB",
    gpus: Annotated[int, typer.Option(help="GPUs asked for.")] = 0,
    bandwidth: Annotated[str, typer.Option(help="Bandwidth asked for, like 2Gbit/s.")] = "0",
    cache: Annotated[str, typer.Option(help="Cache on the node's disk asked for, like 200GiB.")] = "0",
    license: Annotated[
        list[str] | None, typer.Option(help="Licences asked for, like matlab=2; repeat for others.")
    ] = None,
    count: Annotated[int, typer.Option(help="Leases asked for.")] = 1,
    lease_class: Annotated[str, typer.Option("--class", help="reserved, elastic or harvested.")] = "elastic",
    pool: Annotated[str, typer.Option(help="Pool asked from.")] = "default",
    tenant: Annotated[str, typer.Option(help="Tenant that asks.", show_default="your own")] = "",
    at: Annotated[
        datetime | None, typer.Option(help="Time by which clock rules decide, UTC.", show_default="now")
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Tell what a request would get now, without making a lease.

    A denial is an answer too, with exit code 0; programs read `outcome` of --json.

    \b
      isthmus policy dry-run --cores 4 --memory 8GiB
      isthmus policy dry-run new-policy.toml --cores 4
      isthmus policy dry-run --tenant guest --at 2026-12-24T22:00:00
    """
    lease = {
        "resources": {
            "cores": cores,
            "memory": memory,
            "gpus": gpus,
            "bandwidth": bandwidth,
            "cache": cache,
            "licenses": parse_counts(license or []),
        },
        "lease_class": lease_class,
        "count": count,
        "pool": pool,
    }
    body = {
        "lease": lease,
        "policy": None if file is None else _read(file),
        "tenant": tenant,
        "at_s": None if at is None else at.replace(tzinfo=UTC).timestamp(),
    }
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
    _show_replay(document, as_json, "would be different")


@policy.command()
def diff(
    old: Annotated[Path, typer.Argument(help="The rules to compare with.", exists=True, dir_okay=False)],
    new: Annotated[Path, typer.Argument(help="The rules in question.", exists=True, dir_okay=False)],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Decide the site's logged requests by two policy files: which come out differently, and why?

    \b
      isthmus policy diff policy.toml new-policy.toml
    """
    body = {"policy": _read(new), "against": _read(old)}
    document = open_site(state).post("policy", "replay", body=body)
    _show_replay(document, as_json, "differ")


def _show_replay(document: dict[str, Any], as_json: bool, verb: str) -> None:
    """Like changes once, with how many there are and one request for `isthmus explain`."""
    if as_json:
        print_json(document)
        return
    typer.echo(f"{document['judged']} decisions judged, {document['differ']} {verb}")
    counts = Counter(_kind(change) for change in document["changes"])
    examples = {_kind(change): change["demand"]["request"] for change in document["changes"]}
    for kind, count in counts.most_common(GROUPS_MAX):
        tenant, before, after, why = kind
        typer.echo(printable(f"  {count} x {tenant}: {before} -> {after}  (such as {examples[kind]})"))
        for line in why:
            typer.echo(printable(f"      {line}"))
    if len(counts) > GROUPS_MAX:
        typer.echo(f"  and {len(counts) - GROUPS_MAX} other kinds; --json has all")


def _kind(change: dict[str, Any]) -> tuple[str, str, str, tuple[str, ...]]:
    outcomes = change["before"]["outcome"], change["after"]["outcome"]
    return change["demand"]["tenant"], *outcomes, tuple(change["why"])


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{file}: {error}") from error
