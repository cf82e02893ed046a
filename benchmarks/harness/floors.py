"""Floors that no call can undercut: a memcpy, a blocking ping-pong over a Unix socket, raw UCX.

UCX is measured in C++ (`benchmarks/floors`), with the very library that isthmus loads; where that cannot be
built, by UCX's own `ucx_perftest`. Either tells a median: one sample a run.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.harness.subject import PAYLOAD_BYTES, Cells, pin_pair, run
from isthmus.core.errors import FabricError
from isthmus.fabric import libraries

ASLEEP_S = 0.01  # long enough for the peer to sleep and its core to idle
_CLOSE = b"\0"
_UCX_START_S = 5.0
_UCX_LIMIT_S = 60.0
_ROOT = Path(__file__).parents[2]
_BUILD = _ROOT / "build" / "floors"


def measure(cells: Cells) -> None:
    measure_memcpy(cells)
    measure_ucx(cells)
    measure_socket(cells)


def measure_memcpy(cells: Cells) -> None:
    """One copy of 1 MiB between two buffers that both have been touched."""
    source = np.ones(PAYLOAD_BYTES, dtype=np.uint8)
    target = np.zeros(PAYLOAD_BYTES, dtype=np.uint8)
    cells.latency("memcpy_1mib_us", np.copyto, target, source)


def measure_socket(cells: Cells) -> None:
    """1 B there and 1 B back, both sides blocked in recv: back to back, and with both asleep before each."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    child = os.fork()
    if child == 0:
        ours.close()
        _echo(theirs)
        os._exit(0)
    theirs.close()
    cells.notes.append(pin_pair({child}))
    try:
        cells.latency("socket_round_trip_us", _round_trip, ours)
        cells.latency_asleep("socket_asleep_round_trip_us", ASLEEP_S, _round_trip, ours)
        ours.send(_CLOSE)
    finally:
        ours.close()
        os.waitpid(child, 0)


def _round_trip(connection: socket.socket) -> None:
    connection.send(b"x")
    connection.recv(1)


def _echo(connection: socket.socket) -> None:
    while (byte := connection.recv(1)) and byte != _CLOSE:
        connection.send(byte)


def measure_ucx(cells: Cells) -> None:
    """Active messages, polled by both sides: 1 B there and back; 1 MiB one way."""
    program = build_floors()
    if program is not None:
        _measure_ucx_with(program, cells)
        return
    perftest = find_perftest()
    if perftest is None:
        cells.notes.append(
            "raw UCX not measured: neither benchmarks/floors can be built nor ucx_perftest run"
        )
        return
    cells.notes.append(f"raw UCX by {perftest}: perhaps not the library that isthmus loads")
    count = 100_000 if cells.budget.samples > 1_000 else 5_000
    cells.value("ucx_round_trip_us", 2 * ucx_latency_us(perftest, 1, count))
    cells.value("ucx_1mib_us", ucx_latency_us(perftest, PAYLOAD_BYTES, count // 50))


def _measure_ucx_with(program: Path, cells: Cells) -> None:
    """By benchmarks/floors, which pins its two sides to the same cores as `pin_pair`."""
    path = libraries.load().path
    with libraries.defaults():
        answer = subprocess.run(
            [program, path], capture_output=True, text=True, timeout=_UCX_LIMIT_S, check=True
        )
    floors = json.loads(answer.stdout)
    cells.versions["ucx"] = floors["ucx_version"]
    cells.notes.append(f"raw UCX {floors['ucx_version']} of {path}")
    cells.value("ucx_round_trip_us", floors["ucx_round_trip_us"])
    cells.value("ucx_1mib_us", floors["ucx_1mib_round_trip_us"] / 2)


def build_floors() -> Path | None:
    """benchmarks/floors, built in build/floors; None: there is no UCX here, or it cannot be built."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=tools)
    try:
        libraries.load()
    except (FabricError, ImportError):
        return None
    if cmake is None:
        return None
    configure: list[str | Path] = [
        cmake,
        "-S",
        _ROOT,
        "-B",
        _BUILD,
        "-DISTHMUS_FLOORS=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    if not (_BUILD / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja"] if shutil.which("ninja", path=tools) else []
    environment = os.environ | {"PATH": tools}
    build: list[str | Path] = [cmake, "--build", _BUILD, "--target", "floors"]
    for command in (configure, build):
        if subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0:
            return None
    program = _BUILD / "benchmarks" / "floors" / "floors"
    return program if program.exists() else None


def find_perftest() -> Path | None:
    """The wheel's, so that it is the library that isthmus uses; else the system's."""
    wheel = importlib.util.find_spec("libucx")
    if wheel is not None and wheel.origin is not None:
        path = Path(wheel.origin).parent / "bin" / "ucx_perftest"
        if os.access(path, os.X_OK):
            return path
    found = shutil.which("ucx_perftest")
    return Path(found) if found else None


def ucx_latency_us(perftest: Path, message_bytes: int, count: int) -> float:
    """Median of half a round trip of one active message."""
    libraries = {"LD_LIBRARY_PATH": str(perftest.parents[1] / "lib"), "UCX_WARN_UNUSED_ENV_VARS": "n"}
    environment = os.environ | libraries
    port = _free_port()
    command = [str(perftest), "-p", str(port)]
    server = subprocess.Popen([*command, "-c", "1"], env=environment, stdout=subprocess.DEVNULL)
    test = ["127.0.0.1", "-c", "0", "-t", "ucp_am_lat", "-s", str(message_bytes), "-n", str(count), "-f"]
    try:
        _await_listener(port)
        answer = subprocess.run(
            [*command, *test],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_UCX_LIMIT_S,
            check=True,
        )
        server.wait(_UCX_START_S)
    finally:
        server.kill()
        server.wait()
    return float(answer.stdout.splitlines()[-1].split()[1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_listener(port: int) -> None:
    """Until the port is in the kernel's list of listeners; to connect would be taken for a client."""
    wanted = f":{port:04X} 00000000:0000 0A"
    give_up_s = time.monotonic() + _UCX_START_S
    while wanted not in Path("/proc/net/tcp").read_text("ascii"):
        if time.monotonic() > give_up_s:
            raise RuntimeError("ucx_perftest does not listen")
        time.sleep(0.01)


if __name__ == "__main__":
    run("floors", measure)
