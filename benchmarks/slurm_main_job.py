"""The main job, `examples/search_docstrings.py`, unchanged, on what a batch job on Slurm leaves idle.

The batch job holds all cores of the node. It keeps half of them busy for a while, then works in bursts on
all; first alone, then with `isthmus lend` as its first line, while the example runs. One rule of the site's
policy says that leases are harvested ones. Measured, besides the example's own output, which is shown: how
much slower the batch job was, how long its threads took to run at full speed at each burst, and what the
example got.

    python -m benchmarks.slurm_main_job [--quick] [--json FILE]
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.clusters import cluster
from benchmarks.harness.running import ROOT
from benchmarks.slurm_harvest import TAIL_S, WARM_S, Bench, Work, busy_s, wakes
from tests.live.sites import RunningSite, running_site

DOCSTRINGS = 2000
DOCSTRINGS_QUICK = 1000
EXAMPLE_S = 240.0
RULE = """
[[rule]]
name = "on what batch jobs leave idle"
when = "true"
then = "class"
class = "harvested"
"""


def stages(cores: int) -> dict[str, Work]:
    return {
        "half": Work("half the cores busy", "cpu", max(1, cores // 2), 1, 3000, 0),
        "bursts": Work("bursts", "cpu", cores, 5, 400, 800),
    }


def batch(bench: Bench, before: list[str], after: list[str]) -> dict[str, dict[str, Any]]:
    """Run the batch job; what each stage printed."""
    outs = {name: bench.directory / f"{name}.json" for name in stages(bench.cores)}
    works = [bench.command(work, outs[name]) for name, work in stages(bench.cores).items()]
    bench.run_script([*before, *works, *after])
    return {name: json.loads(out.read_text()) for name, out in outs.items()}


def example(site: RunningSite, limit: int) -> str:
    """Its output, shown as it comes."""
    environ = {**os.environ, "ISTHMUS_CLIENT__SITE": site.url, "ISTHMUS_CLIENT__API_KEY": site.key}
    command = [sys.executable, "search_docstrings.py", "--limit", str(limit)]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT / "examples", env=environ, stdout=subprocess.PIPE, text=True
    ) as program:
        killer = threading.Timer(EXAMPLE_S, program.kill)
        killer.start()
        for line in program.stdout or ():
            print(f"    {line}", end="", file=sys.stderr, flush=True)
            lines.append(line)
        killer.cancel()
    if program.returncode:
        raise RuntimeError(f"the example ended with {program.returncode}")
    return "".join(lines)


def beside(bench: Bench, site: RunningSite, limit: int) -> tuple[dict[str, dict[str, Any]], str]:
    """The batch job lends, until the example has ended."""
    done = bench.directory / "done"
    said: list[str] = []

    def run() -> None:
        try:
            said.append(example(site, limit))
        finally:
            done.touch()

    thread = threading.Thread(target=run)
    thread.start()
    lend = f"{sys.executable} -m isthmus lend --state {site.state} || exit 1"
    printed = batch(bench, [lend, f"sleep {2 * WARM_S}"], [f"until [ -e {done} ]; do sleep {TAIL_S}; done"])
    thread.join()
    if not said:
        raise RuntimeError("the example failed; what it said is above")
    return printed, said[0]


def harvested_use(site: RunningSite) -> dict[str, float]:
    with site.client() as client:
        rows = client.get("/v1/usage").json()
    ours = [row for row in rows if row["lease_class"] == "harvested"]
    return {name: sum(row[name] for row in ours) for name in ("busy_core_s", "calls")}


def summary(alone: dict[str, Any], late: dict[str, Any], said: str, site: RunningSite) -> dict[str, Any]:
    speeds = {
        name: wakes(printed["bursts"], Work("", "cpu", 0, 0, 0, 1))["full_speed_ms"]
        for name, printed in (("alone", alone), ("beside", late))
    }
    throughput = next(line for line in said.splitlines() if line.startswith("throughput"))
    return {
        **{
            f"{name}_slowdown_percent": 100 * (busy_s(late[name]) / busy_s(alone[name]) - 1) for name in alone
        },
        **{f"{name}_full_speed_ms_p50": statistics.median(taken) for name, taken in speeds.items()},
        **{f"{name}_full_speed_ms_worst": max(taken) for name, taken in speeds.items()},
        "docstrings_per_s": float(throughput.split()[1].replace(",", "")),
        **harvested_use(site),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{DOCSTRINGS_QUICK} docstrings")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    load_start = machine.load_average()
    with tempfile.TemporaryDirectory(prefix="main-job-", dir="/tmp") as folder:
        directory = Path(folder)
        directory.chmod(0o755)
        policy = directory / "policy.toml"
        policy.write_text(RULE)
        settings = {"ISTHMUS_SLURM__TICK_S": "10", "ISTHMUS_POLICY__FILE": str(policy)}
        with cluster(directory / "slurm", 1, cores) as environ:
            os.environ.update(environ)
            bench = Bench(directory, {**os.environ, **environ}, cores)
            alone = batch(bench, [], [])
            state = directory / "site"
            with running_site(state, "--platform", "slurm", **environ, **settings) as site:
                limit = DOCSTRINGS_QUICK if options.quick else DOCSTRINGS
                start_s = time.monotonic()
                late, said = beside(bench, site, limit)
                result = summary(alone, late, said, site) | {"taken_s": time.monotonic() - start_s}
    document = {
        "benchmark": "slurm_main_job", "machine": dataclasses.asdict(machine.describe()), "cores": cores,
        "load_average": [load_start, machine.load_average()], "summary": result,
    }  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))


if __name__ == "__main__":
    main()
