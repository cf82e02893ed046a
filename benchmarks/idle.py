"""Claim: an idle site uses less than 1 % of a core and less than 150 MB.

All processes of the site are counted: the site itself, its agent, its zygote. Memory is the proportional set
size, so that pages that they share count once.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

import isthmus
from benchmarks.harness.running import descendants
from benchmarks.harness.subject import Cells, run

WATCH_S = 20.0
WATCH_QUICK_S = 2.0
SETTLE_S = 3.0


def measure(cells: Cells) -> None:
    cells.versions["isthmus"] = isthmus.__version__
    quick = cells.budget.seconds < 1
    with isthmus.connect():
        time.sleep(SETTLE_S)  # the start's own work is over
        processes = descendants(os.getpid())
        start_s, start_ticks = time.monotonic(), ticks(processes)
        time.sleep(WATCH_QUICK_S if quick else WATCH_S)
        used_s = (ticks(processes) - start_ticks) / os.sysconf("SC_CLK_TCK")
        cells.value("cpu_percent", 100 * used_s / (time.monotonic() - start_s))
        cells.value("memory_mb", sum(map(proportional_bytes, processes)) / 1e6)
        cells.notes.append(f"{len(processes)} processes")


def ticks(processes: list[int]) -> int:
    """utime + stime (proc_pid_stat(5)) of processes that still run."""
    total = 0
    for process in processes:
        with suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total


def proportional_bytes(process: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text("ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    run("idle", measure)
