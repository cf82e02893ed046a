"""An executor: the forked process that runs the functions of one lease, one call at a time, in its main
thread.

It is forked unassigned by a zygote, opens its fabric, and waits for an Assignment; then it belongs to that
lease until it ends. It outlives its zygote and its agent, and never the deadline on its lease page
(`fencing.py`).
Not here: the loop that serves calls (`serving.py`).
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import msgspec
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

import isthmus.fabric
from isthmus.core import tokens
from isthmus.core.errors import IsthmusError, TokenError
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric.channels import Domain
from isthmus.fabric.frames import CODEC_VERSION, FRAME_VERSION, Hello, Refusal, Welcome
from isthmus.node import assignments, fencing
from isthmus.node.assignments import Assignment, Broken, Ready
from isthmus.node.interruption import CallInterrupted, Terminated
from isthmus.node.page import EXIT_STATUS, PID, START_TICKS, Page
from isthmus.node.processes import start_ticks
from isthmus.node.serving import Server

CREDITS = 256  # frames a client may have in flight: deep enough to hide a round trip, bounded in memory
ANNOUNCE = signal.SIGUSR2
OOM_SCORE = 500  # of 1000


def run(control: socket.socket, fabric: str) -> NoReturn:
    """The whole life of an executor, from just after the fork."""
    zygote = os.getppid()
    os.setsid()
    _offer_to_oom_killer()
    try:
        domain = isthmus.fabric.open_domain(fabric)
    except (IsthmusError, OSError) as error:
        control.send(assignments.pack(Broken(code="FabricError", message=str(error))))
        os._exit(1)
    pools = ThreadpoolController()  # looks through all libraries: milliseconds that no lease waits for
    assignment = _await_assignment(control)
    _allow_threads(pools, assignment.cores)
    if assignment.is_harvested:
        _end_with(zygote)
    page = _occupy(assignment)
    server = Server(domain, page, assignment.spin_s, lambda code: _leave(page, code))
    _handle_signals(server, page)  # before the first signal can come
    try:
        address = domain.listen(assignment.listen, Admission(assignment))
        domain.announce(ANNOUNCE)
    except (IsthmusError, OSError) as error:
        control.send(assignments.pack(Broken(code="FabricError", message=str(error))))
        os._exit(1)
    page.address = address
    control.send(assignments.pack(Ready(address=address)))
    control.close()
    fencing.start(page, domain, assignment)
    _serve(server, page, domain)


def _offer_to_oom_killer() -> None:
    """When the machine runs out of memory, functions go before the site and the agent."""
    with contextlib.suppress(OSError):  # not permitted in some containers: then nobody is preferred
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def _end_with(zygote: int) -> None:
    """Have the kernel end this process when its parent ends. Source: prctl(2), PR_SET_PDEATHSIG."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != zygote:  # it ended before the kernel was asked
        os._exit(0)


def _await_assignment(control: socket.socket) -> Assignment:
    try:
        packet = assignments.unpack(control.recv(assignments.PACKET_BYTES_MAX))
    except (msgspec.MsgspecError, OSError):
        os._exit(0)  # the agent is gone, and with it the reason to wait
    if not isinstance(packet, Assignment):
        os._exit(1)
    return packet


def _occupy(assignment: Assignment) -> Page:
    """Become this lease's: its output, its environment, its page."""
    log = os.open(assignment.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    _extend_path(assignment)
    os.environ["ISTHMUS_SITE"] = assignment.site
    os.environ["ISTHMUS_LEASE"] = assignment.lease
    os.environ["ISTHMUS_LEASE_TOKEN"] = fencing.nested_token(assignment)
    os.environ["OMP_NUM_THREADS"] = str(assignment.cores)
    if assignment.cache:
        os.environ["ISTHMUS_CACHE"] = assignment.cache
    page = Page(Path(assignment.page))
    page[START_TICKS] = start_ticks(os.getpid())
    page[PID] = os.getpid()
    return page


def _extend_path(assignment: Assignment) -> None:
    known = set(sys.path)
    directories = [path for path in assignment.sys_path if path not in known]
    sys.path[:] = [*directories, *sys.path] if assignment.sys_path_first else [*sys.path, *directories]


def _allow_threads(pools: ThreadpoolController, cores: int) -> None:
    """Give NumPy's BLAS and the like a thread per core. Even a number that stays as it is would make some of
    them start theirs, which then spin on the lease's cores for tens of milliseconds.
    """
    for pool in pools.lib_controllers:
        if pool.num_threads != cores:
            pool.set_num_threads(cores)


class Admission:
    """Who may connect: holders of a token of this lease that speak our versions."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment

    def __call__(self, hello: Hello) -> Welcome | Refusal:
        mismatch = version_mismatch(hello)
        if mismatch:
            return Refusal(code="HandshakeError", message=mismatch)
        mine = self._assignment
        try:
            tokens.verify(hello.token, mine.lease_key, mine.lease, fencing.now_s(mine))
        except TokenError as error:
            return Refusal(code="TokenError", message=str(error))
        return Welcome(
            executor=mine.executor,
            python=python_version(),
            isthmus=ISTHMUS_VERSION,
            channel_id=0,
            channel_key=0,
            credits=CREDITS,
            pid=os.getpid(),
        )


def version_mismatch(hello: Hello) -> str:
    """What keeps two sides from understanding each other, with both versions; "" if nothing does."""
    pairs = (
        ("Python", hello.python, python_version(), "code can only be sent between equal versions"),
        ("frame version", hello.frame_version, FRAME_VERSION, "install the same isthmus on both sides"),
        ("codec version", hello.codec_version, CODEC_VERSION, "install the same isthmus on both sides"),
    )
    for what, theirs, ours, advice in pairs:
        if theirs != ours:
            versions = f"isthmus {hello.isthmus} there, {ISTHMUS_VERSION} here"
            return f"the client has {what} {theirs}, this executor has {ours} ({versions}): {advice}"
    return ""


def _handle_signals(server: Server, page: Page) -> None:
    signal.signal(ANNOUNCE, server.on_signal)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def in_child() -> None:
        """A process that user code forked: it is no executor, and must leave the lease's page and clients
        alone.
        """
        server.forked = True
        page.detach()
        signal.signal(ANNOUNCE, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=in_child)


def _serve(server: Server, page: Page, domain: Domain) -> NoReturn:
    """Ends in order by SIGTERM or SIGINT, whether the signal comes in a call, between two or while ending."""
    try:
        server.run()
    except (Terminated, CallInterrupted, KeyboardInterrupt):
        with contextlib.suppress(Terminated, CallInterrupted, KeyboardInterrupt):
            server.close()
            domain.close()
    _leave(page, 0)


def _leave(page: Page, code: int) -> NoReturn:
    """End this process past the interpreter's own ending, which would wait for threads left behind."""
    page[EXIT_STATUS] = code + 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)
