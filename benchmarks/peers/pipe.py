"""multiprocessing.Pipe and a child that answers: the least that Python offers between two processes."""

import time

START_S = time.perf_counter()

import multiprocessing  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402

from benchmarks.harness.subject import Cells, pin_pair, run  # noqa: E402
from benchmarks.peers import workload  # noqa: E402

WINDOW = 64  # requests in flight when pipelined; more could fill both pipes and block both sides


def serve(connection: Connection) -> None:
    """Answer requests until one is None."""
    while (request := connection.recv()) is not None:
        name, arguments = request
        connection.send(getattr(workload, name)(*arguments))


def measure(cells: Cells) -> None:
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.Process(target=serve, args=(theirs,))
    worker.start()
    try:
        measure_client(cells, ours)
        ours.send(None)
        worker.join(10)
    finally:
        worker.kill()


def measure_client(cells: Cells, connection: Connection) -> None:
    def call(name: str, *arguments: object) -> object:
        connection.send((name, arguments))
        return connection.recv()

    call("noop", b"x")
    cells.value("first_s", time.perf_counter() - START_S)
    cells.notes.append(pin_pair({call("process_id")}))
    workload.check_echo(call("echo", workload.ARRAY))
    cells.latency("call_noop_us", call, "noop", b"x")
    cells.latency("call_in_us", call, "take", workload.ARRAY)
    cells.latency("call_out_us", call, "give")
    cells.latency("call_echo_us", call, "echo", workload.ARRAY)
    cells.throughput("call_throughput_per_s", lambda calls: pipeline(connection, calls))


def pipeline(connection: Connection, calls: int) -> None:
    for number in range(calls + WINDOW):
        if number >= WINDOW:
            connection.recv()
        if number < calls:
            connection.send(("noop", (b"x",)))


if __name__ == "__main__":
    run("pipe", measure)
