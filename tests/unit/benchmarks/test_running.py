"""The runner against real subjects that misbehave: each in a process of its own, as in a real run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import machine, report, running
from benchmarks.harness.running import Subject, SubjectFailedError, run_subject

ANSWER = json.dumps({"subject": "s", "samples": {"call_us": [1.0]}, "notes": [], "versions": {}})


@pytest.fixture(scope="module", autouse=True)
def reaper():
    """Only here: daemons that later tests start are nobody's to count, wait for or kill."""
    running.become_reaper()
    yield
    running.become_reaper(False)


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """Makes a subject of some source text."""
    monkeypatch.setattr(running, "ROOT", tmp_path)

    def make(source: str, limit_s: float = 30.0) -> Subject:
        (tmp_path / "misbehaving.py").write_text(source)
        return Subject("s", "misbehaving", Path(sys.executable), limit_s)

    return make


def test_what_a_subject_prints_is_its_answer(subject):
    answer = run_subject(subject(f"print({ANSWER!r})"), ())
    assert (answer.samples, answer.litter) == ({"call_us": [1.0]}, ())


def test_a_subject_that_fails_shows_its_last_words(subject):
    with pytest.raises(SubjectFailedError, match=r"(?s)exit code 1.*ZeroDivisionError"):
        run_subject(subject("1 / 0"), ())


def test_a_subject_that_hangs_is_stopped_at_its_limit(subject):
    with pytest.raises(SubjectFailedError, match="no answer within"):
        run_subject(subject("import signal; signal.pause()", limit_s=0.3), ())


def test_a_process_left_behind_is_killed_and_reported(subject, monkeypatch):
    monkeypatch.setattr(running, "_SETTLE_S", 0.1)
    leave = "import subprocess; subprocess.Popen(['sleep', '60'], stdout=2, start_new_session=True)"
    before = running.descendants(os.getpid())
    answer = run_subject(subject(f"{leave}\nprint({ANSWER!r})"), ())
    assert answer.litter == ("process sleep 60",)
    assert set(running.descendants(os.getpid())) <= set(before)


def test_a_child_that_was_there_before_is_nobodys_litter(subject):
    with subprocess.Popen(["sleep", "60"]) as bystander:
        answer = run_subject(subject(f"print({ANSWER!r})"), ())
        assert (answer.litter, bystander.poll()) == ((), None)
        bystander.kill()


def test_temporary_files_and_homes_of_a_subject_are_its_own_and_are_removed(subject):
    source = f"""
import json, os, tempfile
answer = json.loads({ANSWER!r})
answer["notes"] = [tempfile.mkdtemp(), os.environ["XDG_STATE_HOME"]]
print(json.dumps(answer))
"""
    notes = run_subject(subject(source), ()).notes
    assert Path(notes[1]).parent == Path(notes[0]).parent
    assert not Path(notes[0]).parent.exists()


def test_a_claim_brings_its_floors_and_comparable_cells_of_peers(monkeypatch):
    monkeypatch.setattr(command.environments, "python_of", lambda name, say: Path(sys.executable))
    run = report.Run(machine.describe(), "", quick=True, load_start=0.0)
    planned = {subject.name: wanted for subject, wanted in command.plan({"hot"}, True, run)}
    assert list(planned)[:2] == ["floors", "hot"]
    assert planned["ray"] == ("noop_us",)
    assert [subject.name for subject, _ in command.plan({"hot"}, False, run)] == ["floors", "hot"]


def test_a_claim_that_nothing_compares_with_brings_no_peers():
    run = report.Run(machine.describe(), "", quick=True, load_start=0.0)
    assert [subject.name for subject, _ in command.plan({"idle"}, True, run)] == ["floors", "idle"]
