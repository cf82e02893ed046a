"""What /proc says about processes, and watching those that are not our children. Linux only."""

import asyncio
import os
import signal
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; the second may hold spaces and parentheses."""
    text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    return text.rpartition(")")[2].split()


def start_ticks(pid: int) -> int:
    """Clock ticks from boot to its start: with the pid, the identity of a process. 0: it is gone."""
    try:
        return int(_stat_fields(pid)[19])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_alive(pid: int, started_ticks: int) -> bool:
    """Whether this very process still runs (a zombie does not)."""
    try:
        fields = _stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[19]) == started_ticks and fields[0] not in "ZX"


async def gone(pid: int, started_ticks: int = 0) -> None:
    """Until this process is no more, whoever its parent is; of a pid that has another owner by now, at once.

    started_ticks  tells the owners apart; 0: the caller knows that it is this one
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not started_ticks or is_alive(pid, started_ticks):
            await readable(descriptor)
    finally:
        os.close(descriptor)


async def readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


def cpu_ns(pid: int) -> int:
    """CPU time of a live process and of its children that it has waited for; 0 when it is gone."""
    try:
        fields = _stat_fields(pid)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(field) for field in fields[11:15]) * 1_000_000_000 // _TICKS_PER_S


def main_thread_ns(pid: int) -> int:
    """CPU time of the process's first thread, to the nanosecond; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def is_runnable(pid: int) -> bool:
    """Whether its first thread runs, or would if it had a core."""
    try:
        return _stat_fields(pid)[0] == "R"
    except (FileNotFoundError, ProcessLookupError):
        return False


def running_count() -> int:
    """How many threads of the whole machine run or wait for a core now, the calling one included.

    source   proc(5), loadavg: one short read, whatever runs
    """
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])


def rss_bytes(pid: int) -> int:
    """Resident memory of a live process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


def memory_total_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES


def session_members(sessions: set[int]) -> list[int]:
    """Live processes of these sessions: an executor leads one, and what its functions fork stays in it."""
    members = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                fields = _stat_fields(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[3]) in sessions and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members


def send_signal(pid: int, number: int) -> bool:
    """False when there is no such process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def describe_exit(status: int | None) -> str:
    """ "exit code 3", "signal SIGSEGV"; None: nobody could learn it."""
    if status is None:
        return "its exit status is unknown"
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
