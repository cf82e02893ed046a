"""The README's second table says what the results say, and nothing that they do not."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.slurm_table import BEGIN, END, recovered_percent, render, replaced, verdicts

ROOT = Path(__file__).parents[3]


def quantiles(p50: float, p99: float) -> dict[str, float]:
    return {"count": 20, "p50": p50, "p99": p99, "worst": p99}


def harvest_row(**changed: Any) -> dict[str, Any]:
    speeds = {f"{mode}_full_speed_ms": quantiles(1.5, 3) for mode in ("alone", "naive", "harvested")}
    row = {
        "work": "bursts", "naive_slowdown_percent": 101.0, "harvested_slowdown_percent": 2.5,
        "recovered_percent": 93.25, "recovered_of_unused_percent": 97.0, "idle_core_s": 10.0,
        "got_core_s": 9.325, "reclaim_ms": quantiles(0.5, 12.5), **speeds,
    }  # fmt: skip
    return row | changed


@pytest.fixture
def document() -> dict[str, Any]:
    peers = {name: quantiles(ms, ms) for name, ms in (("bare", 50.0), ("isthmus", 500.0), ("dask", 1900.0))}
    preempted = {
        "in_flight": 1000, "lost": 0, "charged": 0, "ran_again": 11, "batch_waited_s": 1.25,
        "batch_waited_bare_s": 1.0,
    }  # fmt: skip
    load = [
        {"leases": 0, "clients": 0, "answers_to_clients": 0, "requests_per_minute": 150.0},
        {"leases": 48, "clients": 50, "answers_to_clients": 9000, "requests_per_minute": 149.5},
    ]
    main_job = {
        "docstrings_per_s": 150.0, "busy_core_s": 12.5, "calls": 2040, "half_slowdown_percent": 1.5,
        "bursts_slowdown_percent": 2.25, "alone_full_speed_ms_p50": 0.0, "alone_full_speed_ms_worst": 4.0,
        "beside_full_speed_ms_p50": 0.5, "beside_full_speed_ms_worst": 8.0,
    }  # fmt: skip
    return {
        "machine": {"line": "2 cores of a machine", "commit": "abc"},
        "started": "2026-11-24T18:25:00+00:00",
        "load_average": {"start": 0.1, "end": 1.0},
        "quick": False,
        "parts": {
            "harvest": {"summary": [harvest_row()], "cores": 2, "rounds": 3},
            "peers": {"summary": peers, "nodes": 6},
            "preempted": {"summary": preempted},
            "load": {"summary": load},
            "main_job": {"summary": main_job},
        },
    }


def test_each_part_has_its_rows(document: dict[str, Any]) -> None:
    lines = render(document).splitlines()
    assert "| bursts | 101.0 | 2.5 | 93.2 | 97.0 | 0.5 / 12.5 | 1.5 / 1.5 / 1.5 |" in lines
    assert "| Dask-jobqueue | 1900 | 1900 | 38.0 | 20 |" in lines
    assert not [line for line in lines if "Parsl" in line]
    assert any(line.startswith("1,000 calls in flight") and "0 lost, 0 charged" in line for line in lines)
    assert any("after 0.5 ms, at worst 8.0 ms (alone 0.0 ms, at worst 4.0 ms)" in line for line in lines)
    assert any("150 a minute by an idle site, 150 with 48 leases and 50 clients" in line for line in lines)
    assert lines[-1].startswith("2 cores of a machine; real Slurm")


def test_promises_are_judged_by_the_worst_job(document: dict[str, Any]) -> None:
    slow = harvest_row(work="other", harvested_slowdown_percent=7.5, reclaim_ms=quantiles(1, 60))
    document["parts"]["harvest"]["summary"].append(slow)
    parts = {name: part["summary"] for name, part in document["parts"].items()}
    found = {verdict.promise.id: (verdict.outcome, verdict.value) for verdict in verdicts(parts)}
    assert found["harvest-slowdown"] == ("missed", 7.5)
    assert found["harvest-reclaim"] == ("missed", 60)
    assert found["harvest-share"][0] == "met"
    assert found["slurm-lease"] == ("missed", 450.0)
    assert "slurm-lease-ready" not in found
    assert found["slurm-lost"] == ("met", 0)
    assert "| ≤ 5 % | 7.5 % | 1.50× the bound |" in render(document)


def test_a_peer_that_failed_is_said_to_have(document: dict[str, Any]) -> None:
    document["parts"]["peers"]["failures"] = {"parsl": "no module", "dask": "once"}
    lines = render(document).splitlines()
    assert "| Parsl HTEX, SlurmProvider (failed) |  |  |  | 0 |" in lines
    assert any(line.startswith("| Dask-jobqueue (failed at times) | 1900 |") for line in lines)


def test_a_lost_call_is_missed_in_words(document: dict[str, Any]) -> None:
    document["parts"]["preempted"]["summary"]["lost"] = 1
    assert "| ≤ 0 | 1 | missed |" in render(document)


def test_the_share_is_of_all_idle_core_seconds_together() -> None:
    rows = [harvest_row(), harvest_row(idle_core_s=90.0, got_core_s=45.0)]
    assert recovered_percent(rows) == pytest.approx(54.325)
    assert recovered_percent([]) == 0.0


def test_what_was_not_measured_is_not_there(document: dict[str, Any]) -> None:
    document["parts"] = {}
    assert render(document).splitlines() == [
        "2 cores of a machine; real Slurm (); 2026-11-24, commit abc; load 0.10 to 1.00."
    ]


def test_the_readme_has_the_marks_between_which_the_table_goes() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    changed = replaced(readme, "here")
    assert f"{BEGIN}here\n{END}" in changed
    with pytest.raises(ValueError, match="slurm-table:begin"):
        replaced("nothing", "here")
