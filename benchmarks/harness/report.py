"""One run as a report: JSON for machines, text for people.

Invariant: pure functions of what was measured; what failed, was missed or was not measured is said, never
left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.harness.machine import QUIET_LOAD, Machine
from benchmarks.harness.promises import Verdict
from benchmarks.harness.running import Answer
from benchmarks.harness.samples import Summary, summarise

FORMAT = 1
_MARKS = {"met": "✓", "missed": "✗", "unmeasured": "·", "later": "…"}


@dataclass
class Run:
    """Everything one `python -m benchmarks` saw. busy_cores: what others used just before each subject
    started.
    """

    machine: Machine
    started: str
    quick: bool
    load_start: float
    load_end: float = 0.0
    rounds: list[list[Answer]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    busy_cores: list[float] = field(default_factory=list)

    @property
    def quiet(self) -> bool:
        return self.load_start <= QUIET_LOAD and max(self.busy_cores, default=0.0) <= QUIET_LOAD


def summaries(rounds: Sequence[Sequence[Answer]]) -> dict[str, Summary]:
    """Every cell of every subject, named SUBJECT.CELL, over all rounds."""
    samples: dict[str, list[list[float]]] = {}
    for answers in rounds:
        for answer in answers:
            for cell, values in answer.samples.items():
                samples.setdefault(f"{answer.subject}.{cell}", []).append(values)
    return {name: summarise(name, values) for name, values in sorted(samples.items()) if any(values)}


def to_json(run: Run, cells: dict[str, Summary], verdicts: Iterable[Verdict]) -> dict[str, Any]:
    answers = [answer for round_ in run.rounds for answer in round_]
    return {
        "format": FORMAT,
        "started": run.started,
        "quick": run.quick,
        "quiet": run.quiet,
        "load_average": {"start": run.load_start, "end": run.load_end},
        "busy_cores_before_subjects": run.busy_cores,
        "machine": asdict(run.machine) | {"line": run.machine.line},
        "rounds": len(run.rounds),
        "cells": {name: asdict(summary) for name, summary in cells.items()},
        "promises": [
            {"outcome": verdict.outcome, "value": verdict.value, "bound": verdict.promise.bound,
             "shortfall": verdict.shortfall, **asdict(verdict.promise)}
            for verdict in verdicts
        ],
        "versions": {answer.subject: answer.versions for answer in answers},
        "notes": {answer.subject: answer.notes for answer in answers if answer.notes},
        "litter": {answer.subject: answer.litter for answer in answers if answer.litter},
        "seconds": {answer.subject: round(answer.seconds, 1) for answer in answers},
        "failures": run.failures,
    }  # fmt: skip


def to_text(document: dict[str, Any]) -> str:
    return "\n".join(
        [*_heading(document), "", *_cells(document), "", *_promises(document), *_failures(document)]
    )


def _heading(document: dict[str, Any]) -> list[str]:
    load = document["load_average"]
    busy = max(document["busy_cores_before_subjects"], default=0.0)
    lines = [
        document["machine"]["line"],
        f"commit {document['machine']['commit'] or 'unknown'}, {document['rounds']} round(s), load "
        f"{load['start']:.2f} at start, {load['end']:.2f} at end; others used up to {busy:.2f} cores between "
        "subjects",
    ]
    if not document["quiet"]:
        lines.append(f"NOT QUIET: above {QUIET_LOAD} the times below include somebody else's work")
    if document["quick"]:
        lines.append("QUICK: few samples, to see that it works; the times mean little")
    return lines


def _cells(document: dict[str, Any]) -> list[str]:
    rows = [("cell", "n", "p50", "p99", "p99.9", "min", "rounds' medians", "")]
    for name, cell in document["cells"].items():
        numbers = [number(cell[key]) for key in ("p50", "p99", "p99_9", "minimum")]
        spread = f"{number(min(cell['rounds']))} .. {number(max(cell['rounds']))}"
        rows.append((name, str(cell["count"]), *numbers, spread, cell["unit"]))
    return aligned(rows)


def _promises(document: dict[str, Any]) -> list[str]:
    rows = [("", "promise", "bound", "measured", "")]
    for row in document["promises"]:
        value = "" if row["value"] is None else f"{number(row['value'])} {row['unit']}"
        remark = (
            row["shortfall"] or row["later"] or ("not measured" if row["outcome"] == "unmeasured" else "")
        )
        rows.append((_MARKS[row["outcome"]], row["text"], row["bound"], value, remark))
    return aligned(rows)


def _failures(document: dict[str, Any]) -> list[str]:
    lines = [f"FAILED {text}" for text in document["failures"].values()]
    lines += [f"left behind by {name}: {'; '.join(things)}" for name, things in document["litter"].items()]
    return ["", *lines] if lines else []


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def number(value: float) -> str:
    """Three significant digits, thousands separated: 2.63, 41.2, 953, 312,000."""
    if value == 0:
        return "0"
    if abs(value) < 100:
        return f"{value:.3g}"
    digits = len(str(int(abs(value))))
    return f"{round(value, 3 - digits):,.0f}"
