"""Which site a process finds: the more specific word wins, and a named one that does not run is an error."""

import os
from pathlib import Path

import msgspec
import pytest

from isthmus.core.api import SiteFile
from isthmus.core.discovery import Endpoint, discover
from isthmus.core.errors import SiteUnavailableError
from isthmus.core.settings import Settings, load


def running(state: Path, url: str) -> Path:
    """A state directory as of a site that is alive: this process."""
    state.mkdir()
    site = SiteFile(url=url, pid=os.getpid(), version="1", ephemeral=False)
    (state / "site.json").write_bytes(msgspec.json.encode(site))
    (state / "key").write_text("isk_key\n")
    return state


def test_the_state_directory_in_the_environment_names_the_site(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "ISTHMUS_STATE": str(running(tmp_path / "s", "http://127.0.0.1:1"))}
    assert discover(load(environ=environ), environ) == Endpoint("http://127.0.0.1:1", "isk_key")
    environ["ISTHMUS_CLIENT__SITE"] = "http://elsewhere"
    assert discover(load(environ=environ), environ) == Endpoint("http://127.0.0.1:1", "isk_key")


def test_a_named_state_directory_without_a_site_is_an_error_and_no_reason_to_start_one(
    tmp_path: Path,
) -> None:
    environ = {"HOME": str(tmp_path), "ISTHMUS_STATE": str(tmp_path / "my site")}
    with pytest.raises(SiteUnavailableError, match=r"isthmus up --detach --state '.*/my site'"):
        discover(load(environ=environ), environ)


def test_settings_that_a_program_made_are_not_overruled_by_the_environment(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "ISTHMUS_STATE": str(tmp_path / "none")}
    made = Settings(state_dir=str(running(tmp_path / "s", "http://127.0.0.1:1")))
    found = discover(made, environ)
    assert found is not None
    assert found.url == "http://127.0.0.1:1"
