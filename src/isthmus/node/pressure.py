"""Whether somebody waits for memory: what the kernel calls pressure stall information (PSI).

    stalls = Stalls(job_group(job))
    stalls.share(now_ns)    0.07: for 7 % of the time since the look before, some thread waited for memory

It is read from the job's cgroup where that says it (version 2), else from the machine: whoever waits there,
harvested memory is what should go. A kernel without either gives 0.0, and `source` says so.
Not read, on purpose: pressure on cores, since a harvested thread that waits for its owner counts in it as
much as an owner that waits (`owners.py` has the owner's waits, thread by thread); and pressure on disks,
since the cores of an owner that waits for its disk are those that idle.
Source: the kernel's Documentation/accounting/psi.rst.
"""

from pathlib import Path

NODE = Path("/proc/pressure/memory")


class Stalls:
    """Holds the counter of the look before, so one reader only."""

    def __init__(self, group: Path | None, node: Path = NODE) -> None:
        own = [] if group is None else [group / "memory.pressure"]
        self._file = next((file for file in [*own, node] if stalled_us(file) is not None), None)
        self._before: tuple[int, int] | None = None

    @property
    def source(self) -> str:
        return "none" if self._file is None else str(self._file)

    def share(self, now_ns: int) -> float:
        """Of the time since the look before; 0.0 at the first."""
        total_us = None if self._file is None else stalled_us(self._file)
        if total_us is None:  # its cgroup is gone, or there never was one
            return 0.0
        then_ns, then_us = self._before or (now_ns, total_us)
        self._before = (now_ns, total_us)
        return (total_us - then_us) * 1000 / (now_ns - then_ns) if now_ns > then_ns else 0.0


def stalled_us(file: Path) -> int | None:
    """Time in which some thread waited, since boot; None where the kernel does not say."""
    try:
        lines = file.read_text().splitlines()
    except OSError:  # absent, or there and switched off
        return None
    for line in lines:
        kind, *fields = line.split()
        totals = [field.removeprefix("total=") for field in fields if field.startswith("total=")]
        if kind == "some" and totals:
            return int(totals[0])
    return None
