"""Fetch Debian packages and unpack them below the build directory; nothing is installed on this machine.

This machine's own choice of a UCX therefore stays what it was, and no root is needed: `apt-get download` and
`dpkg -x` work for everybody where apt has package lists.
Not here: what the packages are for (`guest.py`) and how a kernel module is found in them (`initramfs.py`).
"""

import re
import shutil
import subprocess
from pathlib import Path

MACHINE = ("qemu-system-x86", "busybox-static")
"""What this machine runs: the emulator, and the static shell that goes into the initramfs."""
FABRIC = (
    "libucx0", "ucx-utils", "ibverbs-providers", "ibverbs-utils", "perftest", "iproute2",
    "systemd", "dbus-user-session",
)  # fmt: skip
"""What the guest runs in addition to this machine's own files."""
KERNEL = "linux-image-amd64"
FETCH_S = 300.0


class MissingPartError(Exception):
    """The guest cannot run here; the message says what to do."""


def unpack_all(build: Path) -> None:
    """Fill `build/machine`, `build/fabric` and `build/kernel`; does nothing for those that are complete."""
    for folder, wanted in (("machine", MACHINE), ("fabric", FABRIC)):
        if not _is_complete(build / folder, wanted):
            _unpack(build / folder, _missing(wanted), wanted)
    if not _is_complete(build / "kernel", (KERNEL,)):
        _unpack(build / "kernel", [_kernel_package()], (KERNEL,))
    _merge_usr(build / "fabric")


def _is_complete(folder: Path, wanted: tuple[str, ...]) -> bool:
    mark = folder / ".complete"
    return mark.exists() and mark.read_text().split() == list(wanted)


def _merge_usr(folder: Path) -> None:
    """Move `lib` into `usr/lib` where this machine's own is a link: in the guest it would hide that."""
    for name in ("bin", "sbin", "lib", "lib64"):
        if (folder / name).is_dir() and Path("/", name).is_symlink():
            shutil.copytree(folder / name, folder / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(folder / name)


def _unpack(folder: Path, packages: list[str], wanted: tuple[str, ...]) -> None:
    """Download and unpack into a fresh folder; the mark comes last, so a cut-off fetch starts over."""
    shutil.rmtree(folder, ignore_errors=True)
    archives = folder.with_name(f"{folder.name}-archives")
    shutil.rmtree(archives, ignore_errors=True)
    archives.mkdir(parents=True)
    folder.mkdir()
    if packages:
        _apt("download", "-q", *packages, folder=archives)
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
    shutil.rmtree(archives)
    (folder / ".complete").write_text("\n".join(wanted))


def _missing(wanted: tuple[str, ...]) -> list[str]:
    """What an installation would add to this machine, dependencies included, upgrades left out."""
    plan = _apt("install", "--simulate", "--no-install-recommends", *wanted)
    return re.findall(r"^Inst (\S+) \(", plan, re.MULTILINE)


def _kernel_package() -> str:
    """The versioned package behind Debian's `linux-image-amd64`."""
    depends = _run(["apt-cache", "depends", KERNEL])
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise MissingPartError(f"apt knows no {KERNEL}; run `apt-get update` on a Debian (amd64) machine")
    return found[1]


def _apt(*arguments: str, folder: Path | None = None) -> str:
    return _run(["apt-get", *arguments], folder)


def _run(command: list[str], folder: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=FETCH_S
        )
    except FileNotFoundError as error:
        raise MissingPartError(f"no {command[0]} here: the guest is built from Debian packages") from error
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing said"]
        raise MissingPartError(
            f"`{' '.join(command)}` failed: {said[0]}\nwith root, try `apt-get update`; or install by hand: "
            f"apt-get install {' '.join(MACHINE + FABRIC)}"
        )
    return done.stdout
