"""Run one emulated machine: boot, copy its console out, give its exit status, leave nothing behind.

Invariant: the emulator never outlives `run`: it is killed in a `finally`, and dies with this process.
Not here: what is in its file systems (`initramfs.py`, `packages.py`).
"""

import ctypes
import os
import re
import selectors
import signal
import subprocess
import time
from pathlib import Path
from typing import IO, NamedTuple

from packages import MissingPartError

PR_SET_PDEATHSIG = 1
CORES = 2
BOOT_OPTIONS = "console=ttyS0 quiet loglevel=3 panic=-1 reboot=t tsc=reliable mitigations=off nokaslr"


class GuestError(Exception):
    """The guest ended without an exit status: panic, time limit, or an emulator that could not start."""


class Shares(NamedTuple):
    """Folders that the guest sees read-only."""

    host: Path
    fabric: Path


def has_kvm() -> bool:
    """Whether hardware virtualization is really there: a /dev/kvm without the processor's flag only spins."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and bool(flags & {"vmx", "svm"})


def run(
    build: Path, initramfs_fd: int, shares: Shares, memory_mib: int, limit_s: float, console: IO[bytes]
) -> int:
    """Boot and run to the end; gives the exit status that the guest reported. Raises GuestError."""
    places = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
    libraries = ":".join(str(build / "machine" / place) for place in places)
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    command = _command(build, initramfs_fd, shares, memory_mib)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        preexec_fn=_die_with_parent, pass_fds=(initramfs_fd,),
    )  # fmt: skip
    try:
        last_words = _copy_console(process, console, time.monotonic() + limit_s)
    except TimeoutError as error:
        raise GuestError(f"it ran past its limit of {limit_s:g} s and was killed") from error
    finally:
        process.kill()
        process.wait()
    status = re.search(rb"guest: status (\d+)\s*$", last_words)
    if status is None:
        raise GuestError(f"no exit status came (emulator: {process.returncode}); see the console above")
    return int(status[1])


def _command(build: Path, initramfs_fd: int, shares: Shares, memory_mib: int) -> list[str]:
    machine = build / "machine/usr"
    emulator = machine / "bin/qemu-system-x86_64"
    kernels = sorted((build / "kernel/boot").glob("vmlinuz-*"))
    if not kernels:
        raise MissingPartError(f"no kernel below {build / 'kernel'}: remove that folder and try again")
    accelerator, processor = ("kvm", "host") if has_kvm() else ("tcg,thread=multi", "max")
    return [
        str(emulator) if emulator.exists() else "qemu-system-x86_64",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio",
        "-L", str(machine / "share/qemu"), "-L", str(machine / "share/seabios"), "-L", "/usr/share/qemu",
        "-machine", "q35", "-accel", accelerator, "-cpu", processor, "-smp", str(CORES),
        "-m", str(memory_mib), "-kernel", str(kernels[-1]),
        "-initrd", f"/proc/self/fd/{initramfs_fd}", "-append", BOOT_OPTIONS,
        "-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile=",
        "-device", "isa-debug-exit",
        *_share("host", shares.host), *_share("fabric", shares.fabric),
    ]  # fmt: skip


def _share(tag: str, folder: Path) -> list[str]:
    return [
        "-fsdev", f"local,id={tag},path={folder},security_model=none,readonly=on,multidevs=remap",
        "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]  # fmt: skip


def _copy_console(process: subprocess.Popen[bytes], console: IO[bytes], until_s: float) -> bytes:
    """Copy what comes, without carriage returns; gives the last of it. Raises TimeoutError at until_s."""
    assert process.stdout is not None
    last_words = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=max(0.0, until_s - time.monotonic())):
                raise TimeoutError
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return last_words
            text = chunk.replace(b"\r", b"")
            last_words = (last_words + text)[-256:]
            console.write(text)
            console.flush()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
