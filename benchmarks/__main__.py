"""Measure every claim, floor and peer, and print each promise beside what was measured.

    python -m benchmarks                        all, about ten minutes; installs peers into .peers/ at first
    python -m benchmarks --only hot             one claim, with its floors and peers
    python -m benchmarks --quick --no-peers     does each benchmark work? two minutes, judges no time

Rounds go over all subjects in turn, so that a machine that drifts drifts for all alike. Each subject runs in
a process of its own. Not here: what is measured (one file per claim beside this one, `floors/`, `peers/`).
"""

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.harness import environments, machine, promises, report
from benchmarks.harness.running import ROOT, Subject, SubjectFailedError, become_reaper, run_subject

ROUNDS = 3
LIMIT_S = 180.0  # of one subject in one round
LIMIT_QUICK_S = 60.0
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = ("hot", "native", "warm", "cold", "payload", "memory", "pipelined", "mapping", "decisions", "idle")
PEERS = {
    "ray": "ray",
    "dask": "dask",
    "parsl": "parsl",
    "zmq": "zmq",
    "grpc": "grpc",
    "pool": "stdlib",
    "pipe": "stdlib",
}
"""Peer -> its requirements file."""
COMPARABLE = {
    "hot": ("noop_us",), "cold": ("first_s",), "payload": ("in_us", "out_us", "echo_us"),
    "pipelined": ("throughput_per_s",),
}  # fmt: skip
"""Claim -> endings of the peers' cells that compare with it."""
_WATCH_S = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    become_reaper()
    chosen = set(options.only) or {*CLAIMS, "floors", *(PEERS if options.peers else ())}
    run = report.Run(
        machine=machine.describe(),
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        quick=options.quick,
        load_start=machine.load_average(),
    )
    subjects = list(plan(chosen, options.peers, run))
    for number in range(1 if options.quick else options.rounds):
        run.rounds.append([])
        for subject, wanted in subjects:
            _measure(run, subject, wanted, f"round {number + 1}")
    run.load_end = machine.load_average()
    cells = report.summaries(run.rounds)
    verdicts = [promises.judge(promise, cells) for promise in promises.load()]
    document = report.to_json(run, cells, verdicts)
    path = _write(document, options.json)
    print(report.to_text(document))
    print(f"\n{path}")
    return 1 if run.failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of few samples; peers only with --peers")
    add("--only", action="append", default=[], metavar="NAME", choices=(*CLAIMS, "floors", *PEERS),
        help="a claim (with floors and peers that compare), `floors` or a peer; may be repeated")  # fmt: skip
    add("--peers", action=argparse.BooleanOptionalAction, default=None, help="measure other systems too")
    add("--rounds", type=int, default=ROUNDS, help=f"rounds over all subjects (default {ROUNDS})")
    add("--json", type=Path, metavar="FILE", help="where results go (default benchmarks/results/TIME.json)")
    options = parser.parse_args(arguments)
    if options.peers is None:
        options.peers = not options.quick
    return options


def plan(chosen: set[str], peers: bool, run: report.Run) -> Iterator[tuple[Subject, tuple[str, ...]]]:
    """The subjects of one round, in order, each with the endings of the cells wanted from it (none: all)."""
    claims = [claim for claim in CLAIMS if claim in chosen]
    ours, limit_s = Path(sys.executable), LIMIT_QUICK_S if run.quick else LIMIT_S
    if claims or "floors" in chosen:
        yield Subject("floors", "benchmarks.harness.floors", ours, limit_s), ()
    for claim in claims:
        yield Subject(claim, f"benchmarks.{claim}", ours, limit_s), ()
    for peer, requirements in PEERS.items():
        wanted = (
            ()
            if peer in chosen
            else tuple(ending for claim in claims for ending in COMPARABLE.get(claim, ()))
        )
        if peer not in chosen and not (peers and wanted):
            continue
        try:
            python = environments.python_of(requirements, _say)
        except environments.EnvironmentFailedError as error:
            run.failures[peer] = f"{peer}: {error}"
        else:
            yield Subject(peer, f"benchmarks.peers.{peer}", python, limit_s), wanted


def _measure(run: report.Run, subject: Subject, wanted: tuple[str, ...], label: str) -> None:
    run.busy_cores.append(machine.busy_cores(_WATCH_S))
    _say(f"{label}: {subject.name}")
    flags = [*(["--quick"] if run.quick else []), *(["--cells", ",".join(wanted)] if wanted else [])]
    try:
        run.rounds[-1].append(run_subject(subject, flags))
    except SubjectFailedError as error:
        run.failures[subject.name] = str(error)
        _say(f"{label}: {subject.name} FAILED")


def _write(document: dict[str, object], path: Path | None) -> Path:
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{document['started']}.json"
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
