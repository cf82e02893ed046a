"""The machine that a number belongs to, and how quiet it was."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

QUIET_LOAD = 0.5
_PACKAGES = ("isthmus", "numpy", "msgspec", "cloudpickle", "httpx", "uvicorn", "libucx-cu12")


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    caches: dict[str, str]
    memory_gib: float
    virtual: bool
    kernel: str
    python: str
    packages: dict[str, str]
    commit: str
    clock_ns: float  # cost of reading the clock once: part of every latency

    @property
    def line(self) -> str:
        """For people, and for the caption of a table."""
        kind = "virtual machine" if self.virtual else "bare metal"
        return (
            f"{self.cores} cores of {self.cpu} ({kind}), {self.memory_gib:.0f} GiB, "
            f"Linux {self.kernel}, Python {self.python}"
        )


def describe() -> Machine:
    cpuinfo = Path("/proc/cpuinfo").read_text("utf-8")
    return Machine(
        cpu=_field(cpuinfo, "model name"),
        cores=len(os.sched_getaffinity(0)),
        caches=_caches(),
        memory_gib=int(_field(Path("/proc/meminfo").read_text("utf-8"), "MemTotal").split()[0]) / 2**20,
        virtual="hypervisor" in _field(cpuinfo, "flags").split(),
        kernel=platform.release().split("-")[0],  # what follows names the builder, not the kernel
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        commit=_commit(),
        clock_ns=_clock_ns(),
    )


def load_average() -> float:
    """Of the last minute, over all cores."""
    return os.getloadavg()[0]


def busy_cores(over_s: float) -> float:
    """Cores busy right now with anything, watched for `over_s`. Ours are idle meanwhile: it is what others
    use.
    """
    first = _busy_ticks()
    time.sleep(over_s)
    return (_busy_ticks() - first) / os.sysconf("SC_CLK_TCK") / over_s


def _busy_ticks() -> int:
    """user + nice + system + irq + softirq + steal of all cores since boot (proc_stat(5))."""
    fields = [int(field) for field in Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]]
    return sum(fields[:3]) + sum(fields[5:8])


def _field(text: str, name: str) -> str:
    """The first `name : value` line of a /proc file."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def _caches() -> dict[str, str]:
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((folder / name).read_text("ascii").strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            caches[f"L{level}"] = size
    return caches


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit measured, with `+` when the tree has changes on top; empty outside a git checkout."""
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10,
        )  # fmt: skip
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()


def _clock_ns() -> float:
    repeats = 100_000
    start_ns = time.perf_counter_ns()
    for _ in range(repeats):
        time.perf_counter_ns()
    return (time.perf_counter_ns() - start_ns) / repeats
