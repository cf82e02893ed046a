"""Commands: login, token create|list|revoke."""

from enum import StrEnum
from typing import Annotated

import typer

from isthmus.cli.failures import EXIT_NOT_FOUND, Failure
from isthmus.cli.options import Json, State
from isthmus.cli.output import age, print_json, printable, show
from isthmus.cli.sites import Site, open_site

token = typer.Typer(
    help="API keys: make, list, revoke.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)


class Role(StrEnum):
    admin = "admin"
    operator = "operator"
    user = "user"


def register(app: typer.Typer) -> None:
    app.command()(login)
    app.add_typer(token, name="token")


def login(
    url: Annotated[str, typer.Argument(help="URL of the site, like https://isthmus.example.org.")] = "",
    forget: Annotated[
        bool, typer.Option("--forget", help="Forget the site (that of URL, else the one in use) and its key.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remember a site and your key for it.

    Programs of this user then find it by themselves.

    \b
      isthmus login https://isthmus.example.org            asks for the key without showing it
      echo $KEY | isthmus login https://isthmus.example.org
      isthmus login --forget                               back to this machine's own site
    """
    from isthmus.core.discovery import Endpoint, Login, is_site_url, login_path, read_login

    known = read_login()
    url, keys = url.rstrip("/"), dict(known.keys)
    if forget:
        forgotten = url or known.site
        if keys.pop(forgotten, None) is None and url:
            raise Failure(f"no key for {url} is known; there are {', '.join(keys) or 'none'}", EXIT_NOT_FOUND)
        url = "" if known.site == forgotten else known.site
    elif not is_site_url(url):
        raise typer.BadParameter(
            "give the site's URL, for example: isthmus login https://isthmus.example.org"
        )
    else:
        endpoint = Endpoint(url, _ask_key())
        Site(url, endpoint.key).get("status")  # a wrong key is refused now, not at the first call
        keys[url] = endpoint.key
    _write(Login(site=url, keys=keys))
    if as_json:
        print_json({"site": url, "file": str(login_path())})
    else:
        typer.echo(f"programs now use {url}" if url else "programs now use this machine's own site")


def _ask_key() -> str:
    import sys

    key = typer.prompt("API key", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()
    return str(key).strip()


def _write(login: object) -> None:
    import os

    import msgspec

    from isthmus.core.discovery import login_path

    path = login_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(login))
    temporary.replace(path)


@token.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose leases it may make.")],
    role: Annotated[
        Role, typer.Option(help="admin: all; operator: nodes and policy; user: own things.")
    ] = Role.user,
    label: Annotated[str, typer.Option(help="To recognise it by, in lists and audits.")] = "",
    state: State = None,
    as_json: Json = False,
) -> None:
    """Make an API key. It is shown once: the site keeps only its hash.

    \b
      isthmus token create physics --label "Ada's laptop"
    """
    document = open_site(state).post("keys", body={"tenant": tenant, "role": role.value, "label": label})
    if as_json:
        print_json(document)
    else:
        typer.echo(document["secret"])  # alone on stdout, so that KEY=$(isthmus token create ...) holds it
        typer.echo(
            printable(f"{document['key']}: {role.value} of {tenant}; shown once, keep it safe"), err=True
        )


@token.command("list")
def list_keys(state: State = None, as_json: Json = False) -> None:
    """List API keys, never their secrets.

    \b
      isthmus token list
    """
    show(
        open_site(state).get("keys"),
        as_json,
        [
            ("KEY", lambda row: row["key"]),
            ("TENANT", lambda row: row["tenant"]),
            ("ROLE", lambda row: row["role"]),
            ("LABEL", lambda row: row["label"]),
            ("CREATED", lambda row: age(row["created_s"])),
            ("STATE", lambda row: "revoked" if row["revoked"] else "valid"),
        ],
        "no keys",
    )


@token.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id (key_...), not its secret.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Revoke an API key at once. Leases it made go on until they end.

    \b
      isthmus token revoke key_01jh2k3m4n5p6q7r
    """
    document = open_site(state).delete("keys", key)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{document['key']} revoked")
