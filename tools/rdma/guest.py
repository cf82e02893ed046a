"""Run a command in a small emulated Linux that has a soft-RoCE RDMA device and a pure cgroup v2 hierarchy.

    python tools/rdma/guest.py run [--limit-s S] [--memory-mib M] -- COMMAND ...
    python tools/rdma/guest.py run-tests     `suites.py`, in the guest; directly where an RDMA device is

The guest sees this machine's whole tree read-only with memory on top, so `COMMAND` runs with the same paths,
and the same Python environment, as here. Everything is built once below `.rdma/`. Exit status: the command's
own; 69 when the guest cannot run here; 70 when it died. Emulated times mean nothing.
"""

import argparse
import hashlib
import os
import shlex
import sys
import tempfile
from pathlib import Path

import initramfs
import machine
import packages

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / ".rdma"
EXIT_UNAVAILABLE, EXIT_DIED = 69, 70
TESTS_LIMIT_S = 580.0
"""Two idle cores need about half of five minutes; a machine that is busy with other things gets its time."""
RDMA_ENVIRONMENT = {
    "UCX_NET_DEVICES": "rxe0:1",  # rxe1 is a second one
    "UCX_TLS": "rc_verbs,ud_verbs,self",
    "UCX_IB_GID_INDEX": "0",
}
"""Index 1 hangs in the wire-up on this device, and `tcp` finds no auxiliary transport."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "run-tests":
            return run_tests()
        if options.verb == "prepare":
            prepare()
            return 0
        return run_in_guest(options.command, {}, options.limit_s, options.memory_mib)
    except packages.MissingPartError as error:
        print(f"the RDMA guest cannot run here: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    except machine.GuestError as error:
        print(f"the RDMA guest died: {error}", file=sys.stderr)
        return EXIT_DIED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("prepare", help="fetch and build everything, run nothing")
    verbs.add_parser("run-tests", help="run what needs RDMA or the guest")
    run = verbs.add_parser("run", help="run one command in the guest")
    run.add_argument("--limit-s", type=float, default=300.0)
    run.add_argument("--memory-mib", type=int, default=2560)
    run.add_argument("command", nargs="+")
    return parser


def run_tests() -> int:
    """The suites, on this machine's own RDMA device or in the guest."""
    suites = [sys.executable, str(Path(__file__).with_name("suites.py"))]
    if any(Path("/sys/class/infiniband").glob("*")):
        os.execv(sys.executable, [*suites, "machine"])
    os.chdir(REPOSITORY)
    return run_in_guest([*suites, "guest"], RDMA_ENVIRONMENT, TESTS_LIMIT_S, memory_mib=4096)


def run_in_guest(command: list[str], environment: dict[str, str], limit_s: float, memory_mib: int) -> int:
    """Build what is missing, boot, run the command with this working directory, and give its exit status."""
    base = prepare()
    script = _script(command, environment)
    with tempfile.TemporaryFile(dir=BUILD) as archive:  # without a name: nothing is left, however this ends
        archive.write(base.read_bytes() + initramfs.archive([("command", 0o100755, script.encode())]))
        archive.flush()
        shares = machine.Shares(host=Path("/"), fabric=BUILD / "fabric")
        return machine.run(BUILD, archive.fileno(), shares, memory_mib, limit_s, sys.stdout.buffer)


def prepare() -> Path:
    """Fetch the packages and build the initramfs if need be; gives the initramfs."""
    BUILD.mkdir(exist_ok=True)
    packages.unpack_all(BUILD)
    init = Path(__file__).with_name("init.sh")
    digest = hashlib.sha256(init.read_bytes() + repr(initramfs.MODULES).encode()).hexdigest()[:16]
    target = BUILD / f"base-{digest}.cpio"
    if not target.exists():
        for stale in BUILD.glob("base-*"):
            stale.unlink()
        unpacked, installed = BUILD / "machine/bin/busybox", Path("/bin/busybox")
        partial = target.with_suffix(".partial")
        partial.write_bytes(
            initramfs.base(unpacked if unpacked.exists() else installed, BUILD / "kernel", init)
        )
        partial.rename(target)
    return target


def _script(command: list[str], environment: dict[str, str]) -> str:
    """What the guest's shell runs."""
    variables = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": "/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    return f"{exports}ulimit -n 65536\ncd {shlex.quote(os.getcwd())}\nexec {shlex.join(command)}\n"


if __name__ == "__main__":
    sys.exit(main())
