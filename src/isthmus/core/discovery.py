"""Find the site a process should speak to, and the key it speaks with. `sdk` and `cli` share it.

In this order: the lease that this code runs under (nested calls), the site whose state directory
ISTHMUS_STATE names, the configured site, the site that `isthmus login` chose, the site that runs for this
user on this machine. Nothing is dialled here: a found site may still be down. Not here: starting an embedded
site (`isthmus.sdk`).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from urllib.parse import urlsplit

import msgspec

from isthmus.core.api import SiteFile
from isthmus.core.errors import AuthError, SettingsError, SiteUnavailableError
from isthmus.core.model import Record
from isthmus.core.settings import Settings, config_path
from isthmus.core.settings_sources import STATE_VARIABLE

SITE_FILE = "site.json"
KEY_FILE = "key"
LOGIN_FILE = "login.json"


@dataclass(frozen=True)
class Endpoint:
    """`key` is the bearer of every request: an API key, or `lease:<lease>:<token>` inside an executor.

    raises  SettingsError for what is no URL, AuthError for what no header can carry; neither shows the key
    """

    url: str
    key: str = field(repr=False)

    def __post_init__(self) -> None:
        if not is_site_url(self.url):
            raise SettingsError(f"{self.url!r} is no URL of a site; write it like http://HOST:PORT")
        for place, character in enumerate(self.key, 1):
            if not "!" <= character <= "~":
                what = "a space or line end" if character.isspace() else "no ASCII"
                raise AuthError(
                    f"the API key cannot be one: character {place} of {len(self.key)} is {what}; copy it "
                    "again, one word, or make another with `isthmus token create`"
                )


def is_site_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        return False


class Login(Record, frozen=True):
    """`login.json` beside the settings file, readable by its user only; written by `isthmus login`."""

    site: str = ""
    keys: dict[str, str] = msgspec.field(default_factory=dict)


def discover(settings: Settings, environ: Mapping[str, str] = os.environ) -> Endpoint | None:
    """The site to use, or None when nothing is configured and none runs here.

    raises  SettingsError; SiteUnavailableError when ISTHMUS_STATE names a site that does not run
    """
    if token := environ.get("ISTHMUS_LEASE_TOKEN"):
        return Endpoint(environ["ISTHMUS_SITE"], f"lease:{environ['ISTHMUS_LEASE']}:{token}")
    if named := _named_state(settings, environ):
        return local_site(named)
    login = read_login(environ)
    if url := settings.client.site or environ.get("ISTHMUS_SITE") or login.site:
        return Endpoint(url.rstrip("/"), _key_of(url.rstrip("/"), settings, login))
    return find_local(settings.state_path)


def _named_state(settings: Settings, environ: Mapping[str, str]) -> Path | None:
    """ISTHMUS_STATE, unless these settings were made by a program and not read from this environment."""
    named = environ.get(STATE_VARIABLE, "")
    return settings.state_path if named and settings.state_dir == named else None


def local_site(state: Path) -> Endpoint:
    """The site of a directory that somebody named. Raises SiteUnavailableError when none runs there."""
    found = find_local(state)
    if found is None:
        raise SiteUnavailableError(
            f"no site is running in {state}; start one with `isthmus up --detach --state {quote(str(state))}`"
        )
    return found


def find_local(state: Path) -> Endpoint | None:
    """The site whose state directory this is, if its process lives and its key is readable."""
    site = read_site(state)
    if site is None:
        return None
    try:
        return Endpoint(site.url, (state / KEY_FILE).read_text("ascii").strip())
    except OSError:
        return None


def read_site(state: Path) -> SiteFile | None:
    """`site.json` of a site that is alive. A file left behind by a killed site counts as no site."""
    site = announced_site(state)
    return site if site is not None and is_alive(site.pid) else None


def announced_site(state: Path) -> SiteFile | None:
    """`site.json`, also where the site runs on another machine that shares this directory."""
    try:
        return msgspec.json.decode((state / SITE_FILE).read_bytes(), type=SiteFile)
    except (OSError, msgspec.MsgspecError):
        return None


def is_alive(pid: int) -> bool:
    """Whether this process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return True  # no /proc here: the signal's word stands


def login_path(environ: Mapping[str, str] = os.environ) -> Path:
    return config_path(environ).parent / LOGIN_FILE


def read_login(environ: Mapping[str, str] = os.environ) -> Login:
    path = login_path(environ)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Login)
    except FileNotFoundError:
        return Login()
    except (OSError, msgspec.MsgspecError) as error:
        raise SettingsError(f"{path}: {error}; run `isthmus login` again or remove the file") from error


def _key_of(url: str, settings: Settings, login: Login) -> str:
    """The key configured for this URL, else the one of a local site that has this very URL."""
    if key := settings.client.api_key or login.keys.get(url, ""):
        return key
    local = find_local(settings.state_path)
    return local.key if local is not None and local.url == url else ""
