"""Promises: at least 90 % of idle core-seconds put to work, at most 5 % batch slowdown, cores back in 50 ms.

A real Slurm cluster of one node with all cores of this machine (`tools/slurm`), and batch jobs that hold all
of them and leave some idle, in known ways (`batch/phases.c`). Each runs in turn

    alone      nothing beside it
    naive      as many busy processes as there are cores beside it, at equal priority
    harvested  `isthmus lend` in its script, and a client that calls a busy function without a pause

in ROUNDS rounds, so that a machine that drifts drifts for all alike. What is printed, medians over rounds:

    slowdown   how much longer the job's fixed work takes than alone, in per cent
    recovered  core-seconds of calls that came back, of those that the job left idle, in per cent; and of
               those that nobody else on this machine used (other programs are owners too)
    reclaim    from the moment at which all of the job's threads wake up, to the last instruction of harvested
               code before it stood still, in ms: seen from inside that code, a look at the clock at a time

    python -m benchmarks.slurm_harvest [--quick] [--json FILE]
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import isthmus
from benchmarks.harness import machine
from isthmus.core.errors import IsthmusError
from tests.live.sites import RunningSite, running_site
from tests.live.slurm.waiting import free_ports

ROOT = Path(__file__).parents[1]
ROUNDS = 3
MODES = ("alone", "naive", "harvested")
CALL_S = 0.2
WARM_S = 4.0  # for the agent to start and to see that the cores idle
JOB_S = 120.0


class Work(NamedTuple):
    """One batch job: threads busy on steps of `kind` for about `busy_ms` in each round, then asleep."""

    name: str
    kind: str
    threads: int
    rounds: int
    busy_ms: int
    idle_ms: int


def works(cores: int) -> tuple[Work, ...]:
    return (
        Work("half the cores busy", "cpu", max(1, cores // 2), 1, 8000, 0),
        Work("all cores busy", "cpu", cores, 1, 5000, 0),
        Work("bursts", "cpu", cores, 5, 600, 1500),
        Work("memory-bound, half", "memory", max(1, cores // 2), 1, 8000, 0),
        Work("writes to disk", "io", 1, 1, 6000, 0),
    )


# what runs as harvested -------------------------------------------------------------------------------------
@isthmus.function(lease_class=isthmus.LeaseClass.HARVESTED, resources=isthmus.Resources(memory="256MiB"))
def busy(duration_s: float) -> list[tuple[int, int]]:
    """When it ran: (from, until) in ns of CLOCK_MONOTONIC, a new pair after each gap."""
    gap_ns, clock = 2_000_000, time.monotonic_ns
    begin = latest = clock()
    end, spans = begin + int(duration_s * 1e9), []
    while latest < end:
        now = clock()
        if now - latest > gap_ns:
            spans.append((begin, latest))
            begin = now
        latest = now
    spans.append((begin, latest))
    return spans


def call_without_pause(site: isthmus.Site, stop: threading.Event) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    while not stop.is_set():
        future = site.submit(busy, CALL_S)
        while not (concurrent.futures.wait([future], timeout=0.1).done or stop.is_set()):
            pass
        if not future.done():
            future.cancel()  # frozen, or waiting for a job that lends
            return spans
        try:
            spans += future.result()
        except IsthmusError:  # nothing is idle now
            stop.wait(0.05)
    return spans


# one run ----------------------------------------------------------------------------------------------------
class Bench:
    def __init__(self, directory: Path, environ: dict[str, str], cores: int) -> None:
        self.directory = directory
        self.environ = environ
        self.cores = cores
        self.program = directory / "phases"
        source = ROOT / "benchmarks" / "batch" / "phases.c"
        subprocess.run(["cc", "-O2", "-pthread", "-o", self.program, source], check=True)
        self.steps = {kind: self._steps_per_ms(kind) for kind in ("cpu", "memory", "io")}

    def _steps_per_ms(self, kind: str) -> float:
        """Of the best of several tries: the others were disturbed."""
        said = [self._run(str(self.program), kind, "calibrate") for _ in range(7)]
        return max(int(line) for line in said) / 100

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environ, cwd=self.directory, capture_output=True, text=True, check=True,
            timeout=JOB_S,
        )  # fmt: skip
        return done.stdout

    def job(self, work: Work, before: Sequence[str] = ()) -> dict[str, Any]:
        """Run one job to its end; what the program printed."""
        steps = int(self.steps[work.kind] * work.busy_ms)
        out = self.directory / "out.json"
        words = (work.kind, work.threads, work.rounds, steps, work.idle_ms)
        lines = ["#!/bin/bash", *before, f"{self.program} {' '.join(map(str, words))} > {out}"]
        script = self.directory / "job.sh"
        script.write_text("\n".join(lines) + "\n")
        shape = (f"--cpus-per-task={self.cores}", "--mem=4G", f"--chdir={self.directory}", "--output=job.out")
        number = self._run("sbatch", "--parsable", *shape, str(script)).strip()
        give_up_s = time.monotonic() + JOB_S
        while number in self._run("squeue", "--noheader", "--format=%A").split():
            if time.monotonic() > give_up_s:
                raise RuntimeError(f"job {number} did not end; see {self.directory}")
            time.sleep(0.3)  # `sbatch --wait` looks more and more seldom
        printed: dict[str, Any] = json.loads(out.read_text())
        return printed

    def alone(self, work: Work, site: RunningSite) -> dict[str, Any]:
        return self.job(work, [f"sleep {WARM_S}"])

    def naive(self, work: Work, site: RunningSite) -> dict[str, Any]:
        spin = f"timeout {JOB_S} {sys.executable} -c 'while True: pass' &"
        return self.job(work, ["trap 'kill $(jobs -p)' EXIT", *[spin] * self.cores, f"sleep {WARM_S}"])

    def harvested(self, work: Work, site: RunningSite) -> dict[str, Any]:
        stop = threading.Event()
        lend = f"{sys.executable} -m isthmus lend --state {site.state} || exit 1"
        with (
            isthmus.connect(site.url, api_key=site.key) as client,
            concurrent.futures.ThreadPoolExecutor(self.cores) as pool,
        ):
            callers = [pool.submit(call_without_pause, client, stop) for _ in range(self.cores)]
            try:
                printed = self.job(work, [lend, f"sleep {WARM_S}"])
            finally:
                stop.set()
            printed["spans"] = sorted(span for caller in callers for span in caller.result())
        return printed


def busy_s(printed: dict[str, Any]) -> float:
    """How long the job's work took in all, its sleep not counted: of the slowest thread in each round."""
    rounds: dict[int, int] = {}
    for due, _, done in printed["rounds"]:
        rounds[due] = max(rounds.get(due, 0), done - due)
    return sum(rounds.values()) / 1e9


def harvest(printed: dict[str, Any], cores: int) -> dict[str, float]:
    """Core-seconds while the job's program ran."""
    begin, end = printed["begin_ns"], printed["end_ns"]
    got_s = sum(max(0, min(until, end) - max(since, begin)) for since, until in printed["spans"]) / 1e9
    idle_s = cores * (end - begin) / 1e9 - printed["cpu_s"]
    others_s = max(0.0, printed["machine_busy_s"] - printed["cpu_s"] - got_s)
    return {"got_s": got_s, "idle_s": idle_s, "others_s": others_s}


def reclaims_ms(printed: dict[str, Any], work: Work, cores: int) -> list[float]:
    """One for each time at which as many threads woke as there are cores."""
    if work.threads < cores or not work.idle_ms:
        return []
    dues: dict[int, int] = {}
    for due, _, done in printed["rounds"]:  # as soon as one thread is done, a core is idle again
        dues[due] = min(dues.get(due, done), done)
    found = []
    for due, done in dues.items():
        late = [min(until, done) - due for since, until in printed["spans"] if since < done and until > due]
        found.append(max(late, default=0) / 1e6)
    return found


def wakes_ms(printed: dict[str, Any]) -> list[float]:
    """How late the job's own threads woke up."""
    return [(woken - due) / 1e6 for due, woken, _ in printed["rounds"]]


# all of it --------------------------------------------------------------------------------------------------
@contextmanager
def cluster(directory: Path, cores: int) -> Iterator[dict[str, str]]:
    up = ["tools/slurm/up.sh", str(directory), "1", str(free_ports(2)), str(cores)]
    try:
        subprocess.run(up, cwd=ROOT, check=True, timeout=120)
        yield {"SLURM_CONF": str(directory / "slurm.conf")}
    finally:
        subprocess.run(["tools/slurm/down.sh", str(directory)], cwd=ROOT, check=False, timeout=60)


def measure(bench: Bench, site: RunningSite, rounds: int, chosen: Sequence[Work]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        for work in chosen:
            for mode in MODES:
                printed = getattr(bench, mode)(work, site)
                run = {"work": work.name, "mode": mode, "round": number, "busy_s": busy_s(printed)}
                run["wakes_ms"] = wakes_ms(printed)
                if mode == "harvested":
                    run |= harvest(printed, bench.cores)
                    run["reclaims_ms"] = reclaims_ms(printed, work, bench.cores)
                runs.append(run)
                print(f"{work.name}, {mode}: work took {run['busy_s']:.2f} s", file=sys.stderr)
    return runs


def summary(runs: list[dict[str, Any]], chosen: Sequence[Work]) -> list[dict[str, Any]]:
    return [_summary(work, [run for run in runs if run["work"] == work.name]) for work in chosen]


def _summary(work: Work, runs: list[dict[str, Any]]) -> dict[str, Any]:
    by_mode = {mode: [run for run in runs if run["mode"] == mode] for mode in MODES}
    alone = statistics.median(run["busy_s"] for run in by_mode["alone"])
    slower = {
        mode: 100 * (statistics.median(run["busy_s"] for run in by_mode[mode]) / alone - 1)
        for mode in ("naive", "harvested")
    }
    harvested = by_mode["harvested"]
    got, idle = sum(run["got_s"] for run in harvested), sum(run["idle_s"] for run in harvested)
    others = sum(run["others_s"] for run in harvested)
    reclaims = sorted(ms for run in harvested for ms in run["reclaims_ms"])
    return {
        "work": work.name,
        "alone_s": alone,
        "naive_slowdown_percent": slower["naive"],
        "harvested_slowdown_percent": slower["harvested"],
        "idle_core_s": idle,
        "recovered_percent": 100 * got / idle if idle > 0.1 * len(harvested) else None,
        "recovered_of_unused_percent": 100 * got / max(got, idle - others) if idle - others > 0.1 else None,
        "reclaim_ms": _quantiles(reclaims),
        **{f"{mode}_wake_ms": _quantiles(sorted(ms for run in by_mode[mode] for ms in run["wakes_ms"]))
           for mode in MODES},
    }  # fmt: skip


def _quantiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"count": len(values), "p50": statistics.median(values), "worst": values[-1]}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| batch job | alone s | naive: slower % | harvested: slower % | recovered % | of what nobody used % "
        "| reclaim p50 / worst ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        reclaim = row["reclaim_ms"]
        cells = [
            row["work"], _figure(row["alone_s"], 2), _figure(row["naive_slowdown_percent"], 1),
            _figure(row["harvested_slowdown_percent"], 1), _figure(row["recovered_percent"], 0),
            _figure(row["recovered_of_unused_percent"], 0),
            f"{reclaim['p50']:.1f} / {reclaim['worst']:.1f}" if reclaim else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What harvesting gains, and what it costs the batch job.")
    parser.add_argument("--quick", action="store_true", help="one round of two jobs: does it work?")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="where all samples go")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    chosen = works(cores)[:3:2] if options.quick else works(cores)
    load_start = machine.load_average()
    with tempfile.TemporaryDirectory(prefix="harvest-", dir="/tmp") as folder:
        directory = Path(folder)
        directory.chmod(0o755)
        with cluster(directory / "slurm", cores) as environ:
            os.environ.update(environ)
            bench = Bench(directory, {**os.environ, **environ}, cores)
            settings = {"ISTHMUS_SLURM__TICK_S": "1"}
            with running_site(directory / "site", "--platform", "slurm", **environ, **settings) as site:
                runs = measure(bench, site, 1 if options.quick else options.rounds, chosen)
    document = {
        "benchmark": "slurm_harvest", "machine": dataclasses.asdict(machine.describe()), "cores": cores,
        "load_average": [load_start, machine.load_average()],
        "rounds": 1 if options.quick else options.rounds, "summary": summary(runs, chosen), "runs": runs,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1))
    print(json.dumps({key: value for key, value in document.items() if key != "runs"}))
    print(table(document["summary"]), file=sys.stderr)


if __name__ == "__main__":
    main()
