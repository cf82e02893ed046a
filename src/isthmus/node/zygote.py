"""A zygote: one process per environment that imports everything once and forks executors from then on.

It stays single-threaded and opens nothing, so that what it forks starts clean: a fork takes a few
milliseconds where an interpreter with its imports takes hundreds. It ends with its agent; the executors it
forked do not.

    python -m isthmus.node.zygote DESCRIPTOR PREPARATION(hex)
"""

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator

import msgspec

from isthmus.core.model import python_version
from isthmus.fabric.frames import CODEC_VERSION
from isthmus.node import assignments
from isthmus.node.assignments import Broken, Exited, Fork, Forked, Preparation, Started


def main(arguments: list[str]) -> None:
    agent = socket.socket(fileno=int(arguments[0]))
    preparation = assignments.unpack(bytes.fromhex(arguments[1]))
    assert isinstance(preparation, Preparation)
    try:
        prepare(preparation)
    except Exception as error:  # a task boundary: a preload is user code and may raise anything
        message = f"the environment could not be prepared: {type(error).__name__}: {error}"
        agent.send(assignments.pack(Broken(code="FunctionLoadError", message=message)))
        return
    agent.send(assignments.pack(Started(python=python_version(), codec_version=CODEC_VERSION)))
    Zygote(agent, preparation.fabric).run()


def prepare(preparation: Preparation) -> None:
    """Import what every executor needs, and freeze it so that forks share it for long."""
    sys.path.extend(path for path in preparation.sys_path if path not in sys.path)
    with _single_threaded():
        importlib.import_module("numpy")
        importlib.import_module("isthmus.node.executor")
        for module in preparation.preload:
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Libraries loaded meanwhile start no threads; an executor allows them as many as its lease has cores."""
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


class Zygote:
    def __init__(self, agent: socket.socket, fabric: str) -> None:
        self._agent = agent
        self._fabric = fabric
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Fork on order, report deaths, until the agent is gone."""
        poll = select.poll()
        poll.register(self._agent, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake.fileno() in ready:
                self._wake.recv(4096)
                self._reap()
            if self._agent.fileno() in ready and not self._obey():
                return

    def _obey(self) -> bool:
        try:
            data = self._agent.recv(assignments.PACKET_BYTES_MAX)
            packet = assignments.unpack(data)
        except (msgspec.MsgspecError, ConnectionError):
            return False  # an empty packet is the end of file
        if isinstance(packet, Fork):
            self._fork()
        return True

    def _fork(self) -> None:
        theirs, ours = assignments.pair()
        try:
            pid = os.fork()
        except OSError as error:
            message = f"cannot fork an executor: {error}"
            self._agent.send(assignments.pack(Broken(code="NoCapacityError", message=message)))
            return
        if pid == 0:
            theirs.close()
            self._become_executor(ours)
        ours.close()
        socket.send_fds(self._agent, [assignments.pack(Forked(pid=pid))], [theirs.fileno()])
        theirs.close()

    def _become_executor(self, control: socket.socket) -> None:
        try:
            from isthmus.node import executor

            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._agent, self._wake, self._woken):
                end.close()
            executor.run(control, self._fabric)
        finally:
            sys.excepthook(*sys.exc_info())  # only a bug comes here: nothing may run the zygote's loop twice
            os._exit(70)

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._report(pid, os.waitstatus_to_exitcode(status), usage)

    def _report(self, pid: int, status: int, usage: resource.struct_rusage) -> None:
        cpu_ns = int((usage.ru_utime + usage.ru_stime) * 1e9)
        try:
            self._agent.send(assignments.pack(Exited(pid=pid, status=status, cpu_ns=cpu_ns)))
        except ConnectionError:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
