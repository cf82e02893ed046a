"""Promises: at least 90 % of idle core-seconds put to work, at most 5 % batch slowdown, cores back in 50 ms.

A real Slurm cluster of one node with all cores of this machine (`tools/slurm`), and batch jobs that hold all
of them and leave some idle, in known ways (`batch/phases.c`). Each runs in turn

    alone      nothing beside it
    naive      as many busy processes as there are cores beside it, at equal priority
    harvested  `isthmus lend` in its script, and a client that calls a busy function without a pause

in ROUNDS rounds, so that a machine that drifts drifts for all alike. What is printed:

    slowdown    how much longer the job's fixed work takes than alone, in per cent: median of rounds' ratios
    recovered   core-seconds of calls that came back, of those that the job left idle, in per cent; and of
                those that nobody else on this machine used (other programs are owners too)
    reclaim     from the owner's wake-up until its cores are its own again, and until each of its threads runs
                at full speed, alone, naive and harvested: `harness/reclaims.py` says what that means
    resume      from the owner's falling asleep until harvested code runs again
    linger      until the agent has frozen the last of the harvested code: our own control loop's reaction

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import isthmus
from benchmarks.harness import machine
from benchmarks.harness.clusters import cluster
from benchmarks.harness.reclaims import full_speed_ms, linger_ms, ran_ns, reclaim_ms, resume_ms
from benchmarks.harness.running import ROOT
from isthmus.core.errors import IsthmusError
from tests.live.sites import RunningSite, running_site

ROUNDS = 3
ROUNDS_S = 420.0  # no round begins that would probably end later
MODES = ("alone", "naive", "harvested")
CALL_S = 0.2
WARM_S = 3.0  # for the agent to start and to see that the cores idle
TAIL_S = 0.5  # for calls that are under way when the job's work is done
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
    half = max(1, cores // 2)
    return (
        Work("half the cores busy", "cpu", half, 1, 3000, 0),
        Work("all cores busy", "cpu", cores, 1, 2000, 0),
        Work("bursts of 0.6 s", "cpu", cores, 4, 600, 900),
        Work("bursts of 60 ms", "cpu", cores, 40, 60, 140),
        Work("streams memory, half the cores", "memory", half, 1, 3000, 0),
        Work("writes to disk", "io", 1, 1, 3000, 0),
    )


QUICK = (0, 2, 4)


# what runs as harvested -------------------------------------------------------------------------------------
@isthmus.function(lease_class=isthmus.LeaseClass.HARVESTED, resources=isthmus.Resources(memory="256MiB"))
def busy(duration_s: float) -> list[tuple[int, int]]:
    """When it ran: (from, until) in ns of CLOCK_MONOTONIC, a new pair after each gap."""
    gap_ns, clock = 200_000, time.monotonic_ns
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
        out = self.directory / "out.json"
        self.run_script([*before, self.command(work, out), f"sleep {TAIL_S}" if before else ""])
        printed: dict[str, Any] = json.loads(out.read_text())
        return printed

    def command(self, work: Work, out: Path) -> str:
        """The work as a line of a script."""
        steps = int(self.steps[work.kind] * work.busy_ms)
        words = (work.kind, work.threads, work.rounds, steps, work.idle_ms)
        return f"{self.program} {' '.join(map(str, words))} > {out}"

    def run_script(self, lines: Sequence[str]) -> None:
        """As a job that holds all cores, to its end."""
        script, ended = self.directory / "job.sh", self.directory / "ended"
        ended.unlink(missing_ok=True)
        script.write_text("\n".join(["#!/bin/bash", *lines, f"touch {ended}"]) + "\n")
        shape = (f"--cpus-per-task={self.cores}", "--mem=4G", f"--chdir={self.directory}", "--output=job.out")
        number = self._run("sbatch", "--parsable", *shape, str(script)).strip()
        give_up_s = time.monotonic() + JOB_S
        while not ended.exists() or number in self._run("squeue", "--noheader", "--format=%A").split():
            if time.monotonic() > give_up_s:
                raise RuntimeError(f"job {number} did not end; see {self.directory}")
            time.sleep(0.1)  # a look at a file: asking Slurm meanwhile would take the job's cores

    def alone(self, work: Work, site: RunningSite) -> dict[str, Any]:
        return self.job(work)

    def naive(self, work: Work, site: RunningSite) -> dict[str, Any]:
        spin = f"timeout {JOB_S} {sys.executable} -c 'while True: pass' &"
        return self.job(work, ["trap 'kill $(jobs -p)' EXIT", *[spin] * self.cores, f"sleep {TAIL_S}"])

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
    for due, _, done, _ in printed["rounds"]:
        rounds[due] = max(rounds.get(due, 0), done - due)
    return sum(rounds.values()) / 1e9


def harvest(printed: dict[str, Any], cores: int) -> dict[str, float]:
    """Core-seconds while the job's program ran."""
    begin, end = printed["begin_ns"], printed["end_ns"]
    got_s = ran_ns(printed.get("spans", ()), begin, end) / 1e9
    idle_s = cores * (end - begin) / 1e9 - printed["cpu_s"]
    others_s = max(0.0, printed["machine_busy_s"] - printed["cpu_s"] - got_s)
    return {"got_s": got_s, "idle_s": idle_s, "others_s": others_s}


def wakes(printed: dict[str, Any], work: Work) -> dict[str, list[float]]:
    """One for each thread and time at which it woke."""
    if work.kind != "cpu" or not work.idle_ms:
        return {"wake_ms": [], "full_speed_ms": []}
    rounds = printed["rounds"]
    return {
        "wake_ms": [(woken - due) / 1e6 for due, woken, _, _ in rounds],
        "full_speed_ms": [full_speed_ms(gaps, due, woken, done) for due, woken, done, gaps in rounds],
    }


def reclaims(printed: dict[str, Any], work: Work, cores: int) -> dict[str, list[float]]:
    """One for each time at which as many threads woke as there are cores."""
    if work.threads < cores or not work.idle_ms:
        return {"reclaim_ms": [], "linger_ms": [], "resume_ms": []}
    rounds: dict[int, list[int]] = {}
    for due, _, done, _ in printed["rounds"]:
        rounds.setdefault(due, []).append(done)
    # as soon as one thread is done, a core is idle again; when the last is, all are
    wanted = [(due, min(dones)) for due, dones in rounds.items()]
    asleep = [max(dones) for dones in rounds.values()]
    spans = printed["spans"]
    return {
        "reclaim_ms": [reclaim_ms(spans, due, done, cores) for due, done in wanted],
        "linger_ms": [linger_ms(spans, due, done) for due, done in wanted],
        "resume_ms": [
            resume_ms(spans, done, due) for done, (due, _) in zip(asleep[:-1], wanted[1:], strict=True)
        ],
    }


# all of it --------------------------------------------------------------------------------------------------
def measure(bench: Bench, site: RunningSite, rounds: int, chosen: Sequence[Work]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    begin_s = time.monotonic()
    for number in range(rounds):
        taken_s = time.monotonic() - begin_s
        if number and taken_s * (number + 1) / number > ROUNDS_S:
            break  # a busy machine: fewer rounds, and the document says how many
        for work in chosen:
            for mode in MODES:
                runs.append(one_run(bench, site, work, mode) | {"round": number})
                print(f"{work.name}, {mode}: work took {runs[-1]['busy_s']:.2f} s", file=sys.stderr)
    return runs


def one_run(bench: Bench, site: RunningSite, work: Work, mode: str) -> dict[str, Any]:
    printed = getattr(bench, mode)(work, site)
    run = {"work": work.name, "mode": mode, "busy_s": busy_s(printed)}
    run |= harvest(printed, bench.cores) | wakes(printed, work)
    return run | reclaims(printed, work, bench.cores) if mode == "harvested" else run


def summary(runs: list[dict[str, Any]], chosen: Sequence[Work]) -> list[dict[str, Any]]:
    return [_summary(work, [run for run in runs if run["work"] == work.name]) for work in chosen]


def _summary(work: Work, runs: list[dict[str, Any]]) -> dict[str, Any]:
    by_mode = {mode: [run for run in runs if run["mode"] == mode] for mode in MODES}
    harvested, naive = by_mode["harvested"], by_mode["naive"]
    got, idle = _sum(harvested, "got_s"), _sum(harvested, "idle_s")
    others = _sum(harvested, "others_s")
    is_idle = idle > 0.1 * len(harvested)
    return {
        "work": work.name,
        "alone_s": statistics.median(run["busy_s"] for run in by_mode["alone"]),
        **{f"{mode}_slowdown_percent": _slowdown_percent(by_mode["alone"], by_mode[mode])
           for mode in MODES[1:]},
        "idle_core_s": idle,
        "got_core_s": got,
        "naive_recovered_percent": 100 * _sum(naive, "others_s") / _sum(naive, "idle_s") if is_idle else None,
        "recovered_percent": 100 * got / idle if is_idle else None,
        "recovered_of_unused_percent": 100 * got / max(got, idle - others) if is_idle else None,
        **{name: _quantiles(harvested, name) for name in ("reclaim_ms", "linger_ms", "resume_ms")},
        **{f"{mode}_{name}": _quantiles(by_mode[mode], name)
           for mode in MODES for name in ("wake_ms", "full_speed_ms")},
    }  # fmt: skip


def _slowdown_percent(alone: list[dict[str, Any]], beside: list[dict[str, Any]]) -> float:
    """The median of the rounds' ratios: what drifts between rounds drops out."""
    pairs = zip(alone, beside, strict=True)
    return 100 * (statistics.median(late["busy_s"] / first["busy_s"] for first, late in pairs) - 1)


def _sum(runs: list[dict[str, Any]], name: str) -> float:
    return sum(run[name] for run in runs)


def _quantiles(runs: list[dict[str, Any]], name: str) -> dict[str, float] | None:
    """`p99` is the worst where there are fewer than a hundred."""
    values = sorted(value for run in runs for value in run[name])
    if not values:
        return None
    p99 = values[min(len(values) - 1, int(len(values) * 0.99))]
    return {"count": len(values), "p50": statistics.median(values), "p99": p99, "worst": values[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description="What harvesting gains, and what it costs the batch job.")
    parser.add_argument("--quick", action="store_true", help="one round of three jobs: does it work?")
    parser.add_argument("--only", metavar="WORDS", help="only jobs with these words in their name")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="where all samples go")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    chosen = [works(cores)[number] for number in QUICK] if options.quick else works(cores)
    if options.only:
        chosen = [work for work in works(cores) if options.only in work.name]
    rounds = 1 if options.quick else options.rounds
    load_start = machine.load_average()
    with tempfile.TemporaryDirectory(prefix="harvest-", dir="/tmp") as folder:
        directory = Path(folder)
        directory.chmod(0o755)
        with cluster(directory / "slurm", 1, cores) as environ:
            os.environ.update(environ)
            bench = Bench(directory, {**os.environ, **environ}, cores)
            settings = {"ISTHMUS_SLURM__TICK_S": "10"}  # the site lives on a login node elsewhere
            with running_site(directory / "site", "--platform", "slurm", **environ, **settings) as site:
                runs = measure(bench, site, rounds, chosen)
    document = {
        "benchmark": "slurm_harvest", "machine": dataclasses.asdict(machine.describe()), "cores": cores,
        "load_average": [load_start, machine.load_average()],
        "rounds": 1 + runs[-1]["round"], "summary": summary(runs, chosen), "runs": runs,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1))
    print(json.dumps({key: value for key, value in document.items() if key != "runs"}))


if __name__ == "__main__":
    main()
