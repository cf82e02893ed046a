"""Settings: variables before the file before the defaults, and a misspelt key is refused with its path."""

from pathlib import Path

import pytest

from isthmus.core.errors import SettingsError
from isthmus.core.settings import Settings, config_path, load


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "isthmus.toml"
    path.write_text(text, "utf-8")
    return path


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load(environ={"HOME": str(tmp_path)}) == Settings()


def test_a_variable_goes_before_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "[leasing]\nlease_s = 7.0\ngrace_s = 1.0\n")
    settings = load(path, {"ISTHMUS_LEASING__LEASE_S": "9"})
    assert (settings.leasing.lease_s, settings.leasing.grace_s) == (9.0, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[leasing]\nlease = 1\n", r"unknown field `lease` - at `\$.leasing`"),
        ("[leasing]\nlease_s = 0\n", r"lease_s"),
        ("[leasing]\nlease_s = 'soon'\n", r"lease_s"),
        ("[typo]\n", r"typo"),
        ("= 1\n", r"isthmus.toml"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load(written(tmp_path, text), {})


def test_a_wrong_variable_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="lease_s"):
        load(written(tmp_path, ""), {"ISTHMUS_LEASING__LEASE_S": "soon"})


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no settings file"):
        load(tmp_path / "none.toml", {})
    with pytest.raises(SettingsError, match="no settings file"):
        load(environ={"ISTHMUS_CONFIG": str(tmp_path / "none.toml")})


def test_the_file_is_found_where_the_environment_says() -> None:
    assert config_path({"ISTHMUS_CONFIG": "/a/b.toml"}) == Path("/a/b.toml")
    assert config_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/isthmus/isthmus.toml")
    assert config_path({"HOME": "/h"}) == Path("/h/.config/isthmus/isthmus.toml")
