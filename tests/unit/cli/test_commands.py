"""Every command teaches, is quick to say what it does, and fails in one clear line."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

from isthmus.cli.main import app
from tests.live.commands import commander


def _walk(command, path=()):
    """(words, command) of every command that does something."""
    if not hasattr(command, "commands"):
        yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk(inner, (*path, name))


COMMANDS = dict(_walk(typer.main.get_command(app)))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    return commander(monkeypatch, capsys, home=tmp_path)


def test_all_promised_commands_exist():
    promised = (
        "up down status nodes leases functions calls logs explain bench fabric config login drain resume"
        " usage release cancel"
    )
    assert {(name,) for name in promised.split()} <= set(COMMANDS)
    assert {("token", name) for name in ("create", "list", "revoke")} <= set(COMMANDS)
    assert {("policy", name) for name in ("check", "dry-run", "replay", "diff")} <= set(COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_speaks_json(words):
    shown = CliRunner().invoke(app, [*words, "--help"])
    assert shown.exit_code == 0
    assert f"isthmus {' '.join(words)}" in shown.output
    assert "--json" in shown.output


@pytest.mark.parametrize(
    "words",
    ["status", "nodes", "leases", "functions", "calls", "usage", "logs ls_x", "explain ls_x", "release ls_x",
     "cancel call_x", "drain n", "resume n", "token list", "token create t", "token revoke key_x",
     "policy show", "policy dry-run", "down"],
)  # fmt: skip
def test_without_a_site_a_command_says_how_to_start_one(run, words):
    done = run(*words.split())
    assert (done.code, done.words) == (3, "")
    assert done.complaint.startswith("isthmus: no site is running in ")
    assert done.complaint.count("\n") == 1


def test_help_loads_next_to_nothing_so_that_it_answers_soon():
    probe = "import sys, isthmus.cli.main; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    costly = {"rich", "httpx", "msgspec", "numpy", "uvicorn", "starlette", "cel", "cloudpickle", "sqlite3"}
    assert not costly & set(done.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["login"],
        ["login", "foo"],
        ["explain"],
        ["up", "--port", "99999"],
        ["leases", "--nonsense"],
    ],
    ids=" ".join,
)
def test_wrong_usage_has_exit_code_2(run, arguments):
    assert run(*arguments).code == 2


@pytest.mark.parametrize("flags", [[], ["--detach"]], ids=["here", "detached"])
def test_a_state_directory_that_cannot_be_one_is_told_in_one_line(run, tmp_path, flags):
    (tmp_path / "thesis").write_text("years of work")
    done = run("up", "--state", str(tmp_path / "thesis"), *flags)
    assert done.code == 1
    assert f"cannot use {tmp_path}/thesis as state directory" in done.complaint
    assert done.complaint.count("\n") == 1


def test_config_tells_value_origin_and_meaning(run, tmp_path):
    (tmp_path / ".config" / "isthmus").mkdir(parents=True)
    (tmp_path / ".config" / "isthmus" / "isthmus.toml").write_text("[leasing]\ngrace_s = 7\n")
    rows = _settings(run, ISTHMUS_LEASING__LEASE_S="5")
    assert (rows["leasing.lease_s"]["value"], rows["leasing.lease_s"]["origin"]) == (5.0, "environment")
    assert (rows["leasing.grace_s"]["value"], rows["leasing.grace_s"]["origin"]) == (7.0, "file")
    assert rows["leasing.tick_s"]["origin"] == "default"
    assert all(row["description"] for row in rows.values())


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["words", "json"])
def test_config_never_shows_the_api_key(run, flags):
    done = run("config", *flags, ISTHMUS_CLIENT__API_KEY="isk_secret")
    assert done.code == 0
    assert "isk_secret" not in done.words


def test_config_init_writes_a_file_that_changes_nothing_and_never_overwrites(run, tmp_path):
    before = _settings(run)
    path = tmp_path / ".config" / "isthmus" / "isthmus.toml"
    assert json.loads(run("config", "--init", "--json").words) == {"file": str(path)}
    assert _settings(run) == before
    changed = path.read_text().replace("# lease_s = 30.0", "lease_s = 6.0")
    path.write_text(changed)
    row = _settings(run)["leasing.lease_s"]
    assert (row["value"], row["origin"]) == (6.0, "file")
    again = run("config", "--init")
    assert again.code == 1
    assert "exists already" in again.complaint
    assert path.read_text() == changed


def _settings(run, **environment):
    return {row["path"]: row for row in json.loads(run("config", "--json", **environment).words)}


def test_a_misspelt_setting_is_one_line_with_its_path(run):
    done = run("config", ISTHMUS_LEASING__LEESE_S="5")
    assert done.code == 1
    assert "leese_s" in done.complaint
    assert done.complaint.count("\n") == 1


def test_a_policy_file_is_checked_without_a_site(run, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nname = "a"\nthen = "deny"\n')
    good = run("policy", "check", str(policy), "--json")
    checked = {"file": str(policy), "rules": ["a"], "tenants": [], "advice": [], "errors": []}
    assert json.loads(good.words) == checked
    policy.write_text('[[rule]]\nname = "a"\nthen = "denny"\n')
    bad = run("policy", "check", str(policy))
    assert bad.code == 1
    assert f"{policy}:3" in bad.complaint


def test_all_errors_of_a_policy_file_are_told_in_its_order(run, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(
        "[tenants.a]\nweight = 0\n"
        '[[rule]]\nname = "a"\nthen = "denny"\n'
        '[[rule]]\nname = "b"\nthen = "deny"\nwhen = "clock.our > 3"\n'
        "[fare]\nhalf_life_h = 3\n[fair]\nhalf_life_h = -1\n"
        '[[rule]]\nname = "c"\nthen = "deny"\n[[rule]]\nname = "c"\nthen = "deny"\n'
    )
    lines = ["2", "5", "9", "10", "13", "17"]
    told = run("policy", "check", str(policy))
    assert told.code == 1
    assert [line.split(":")[2] for line in told.complaint.splitlines()] == lines
    as_json = run("policy", "check", str(policy), "--json")
    assert as_json.code == 1
    document = json.loads(as_json.words)
    assert [error.split(":")[1] for error in document["errors"]] == lines
    assert document["rules"] == ["c", "c"]


def test_a_site_that_does_not_answer_is_told_as_such_without_the_key(run):
    dead = {"ISTHMUS_CLIENT__SITE": "http://127.0.0.1:9", "ISTHMUS_CLIENT__API_KEY": "isk_secret"}
    done = run("status", **dead)
    assert done.code == 3
    assert "does not answer" in done.complaint
    assert "check the URL" in done.complaint
    assert "isk_secret" not in done.complaint


@pytest.mark.parametrize("printed", ["", "sbatch: odd\n", "12;cluster\n", "12\n"])
def test_a_number_that_sbatch_does_not_print_is_a_failure_with_words(tmp_path, monkeypatch, printed):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\nprintf {shlex.quote(printed)}\n")
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "job.sh").write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = CliRunner().invoke(app, ["sbatch", "--json", str(tmp_path / "job.sh")])
    if printed.startswith("12"):
        assert json.loads(done.stdout)["job"] == 12
    else:
        assert "sbatch named no job" in str(done.exception)
        assert "squeue --me" in str(done.exception)
