"""Settings: variables before the file before the defaults, and a misspelt key is refused with its path."""

import re
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
        ("[leasing]\nlease_s = inf\n", r"no finite number - at `\$.leasing.lease_s`"),
        ("[leasing.pools.a]\nidle_s = nan\n", r"idle_s"),
        ("[node]\nmemory = 'lots'\n", r"lots"),
        ("[node]\nlisten = 'foo'\n", r"write it like tcp://"),
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


def test_plain_settings_can_be_variables_too(tmp_path: Path) -> None:
    settings = load(written(tmp_path, ""), {"ISTHMUS_PLATFORM": "slurm", "ISTHMUS_CACHE_DIR": "/c"})
    assert (settings.platform, settings.cache_dir) == ("slurm", "/c")
    for name in ("ISTHMUS_STATE", "ISTHMUS_STATE_DIR"):
        assert load(written(tmp_path, "state_dir = '/f'"), {name: "/s"}).state_path == Path("/s")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ISTHMUS_LEASING_LEASE_S", "as in ISTHMUS_LEASING__LEASE_S"),
        ("ISTHMUS_PLATFROM", "did you mean ISTHMUS_PLATFORM?"),
        ("ISTHMUS_LEESING__LEASE_S", "leesing"),
        ("ISTHMUS_PLATFORM__NAME", "platform"),
    ],
)
def test_a_variable_that_is_nearly_a_setting_is_refused(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        load(written(tmp_path, ""), {name: "1"})


def test_variables_that_are_no_settings_pass(tmp_path: Path) -> None:
    names = ("CACHE", "LEASE", "LEASE_TOKEN", "SITE", "AGENT_KEY", "UCX_LIBRARY", "TEST_REQUIRES", "VERSION")
    assert load(written(tmp_path, ""), {f"ISTHMUS_{name}": "x" for name in names}) == Settings()


def test_a_path_in_the_file_is_taken_from_the_files_directory(tmp_path: Path) -> None:
    path = written(
        tmp_path, "[policy]\nfile = 'p.toml'\nsignals = 'https://s/x'\n[node]\ncache_path = '/c'\n"
    )
    settings = load(path, {})
    assert settings.policy.file == str(tmp_path / "p.toml")
    assert (settings.policy.signals, settings.node.cache_path) == ("https://s/x", "/c")
    assert load(path, {"ISTHMUS_POLICY__FILE": "p.toml"}).policy.file == "p.toml"
    path.write_text('[policy]\nfile = "~nobody-of-that-name/p.toml"\n')
    with pytest.raises(SettingsError, match=r"policy\.file: "):
        load(path, {})
