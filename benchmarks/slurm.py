"""Measure what is claimed of isthmus on Slurm, on real clusters, and print the README's second table.

    python -m benchmarks.slurm                 about ten minutes; installs peers into .peers/ at first
    python -m benchmarks.slurm --quick         does it all work? four minutes, judges no time
    python -m benchmarks.slurm --only harvest

Each part is a program of its own, takes --quick and --json FILE, and starts a cluster of its own. Not here:
what is measured (`slurm_PART.py`), and the table (`slurm_table.py`).
"""

import argparse
import datetime
import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import slurm_table
from benchmarks.harness import machine
from benchmarks.harness.running import ROOT

PARTS = ("harvest", "peers", "preempted", "load", "main_job")
PART_S = 900.0  # then it is interrupted
END_S = 60.0  # then it is killed


def run_part(name: str, is_quick: bool) -> dict[str, Any]:
    """Its document. Raises RuntimeError with its last words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        words = [sys.executable, "-m", f"benchmarks.slurm_{name}", "--json", str(path)]
        words += ["--quick"] if is_quick else []
        with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as part:
            try:
                part.wait(PART_S)
            except subprocess.TimeoutExpired:
                part.send_signal(signal.SIGINT)  # it takes its cluster down
                try:
                    part.wait(END_S)
                except subprocess.TimeoutExpired:
                    part.kill()
        if not path.exists():
            raise RuntimeError(f"slurm_{name} ended with {part.returncode}; what it said is above")
        document: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return document


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="does it all work?")
    parser.add_argument("--only", action="append", default=[], choices=PARTS, help="may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default benchmarks/results/slurm.json")
    options = parser.parse_args()
    here = machine.describe()
    load_start = machine.load_average()
    parts: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name in options.only or PARTS:
        print(f"slurm_{name}", file=sys.stderr, flush=True)
        try:
            parts[name] = run_part(name, options.quick)
            failures |= {f"{name}, {what}": why for what, why in parts[name].get("failures", {}).items()}
        except RuntimeError as error:
            failures[name] = str(error)
    document = {
        "benchmark": "slurm", "machine": asdict(here) | {"line": here.line}, "quick": options.quick,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": {"start": load_start, "end": machine.load_average()},
        "parts": parts, "failures": failures,
    }  # fmt: skip
    path = options.json or ROOT / "benchmarks" / "results" / "slurm.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(slurm_table.render(document))
    for name, words in failures.items():
        print(f"{name} failed: {words}", file=sys.stderr)
    print(f"\n{path}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
