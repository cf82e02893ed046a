"""gRPC: unary bytes over a Unix socket with pickle 5, one server process with one worker thread."""

import time

START_S = time.perf_counter()

import multiprocessing  # noqa: E402
import pickle  # noqa: E402
import tempfile  # noqa: E402
from collections import deque  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402

import grpc  # noqa: E402

from benchmarks.harness.subject import Cells, pin_pair, run  # noqa: E402
from benchmarks.peers import workload  # noqa: E402

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
WINDOW = 256  # requests in flight when pipelined: as many as an isthmus channel has credits


def answer(request: bytes, context: object) -> bytes:
    name, arguments = pickle.loads(request)
    return pickle.dumps(getattr(workload, name)(*arguments), protocol=5)


def serve(address: str, control: Connection) -> None:
    """Serve until the other end of `control` closes."""
    server = grpc.server(ThreadPoolExecutor(1), options=OPTIONS)
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("peer", {"call": handler})])
    server.add_insecure_port(address)
    server.start()
    control.send(True)
    try:
        control.recv()
    except EOFError:
        server.stop(0).wait(5)


def measure(cells: Cells) -> None:
    cells.versions["grpcio"] = grpc.__version__
    address = f"unix:{tempfile.mkdtemp()}/grpc"
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=serve, args=(address, theirs))
    server.start()
    theirs.close()
    try:
        ours.recv()
        with grpc.insecure_channel(address, options=OPTIONS) as channel:
            measure_client(cells, channel)
        ours.close()
        server.join(10)
    finally:
        server.kill()


def measure_client(cells: Cells, channel: grpc.Channel) -> None:
    remote = channel.unary_unary("/peer/call")

    def call(name: str, *arguments: object) -> object:
        return pickle.loads(remote(pickle.dumps((name, arguments), protocol=5)))

    call("noop", b"x")
    cells.value("first_s", time.perf_counter() - START_S)
    cells.notes.append(pin_pair({call("process_id")}))
    workload.check_echo(call("echo", workload.ARRAY))
    cells.latency("unary_noop_us", call, "noop", b"x")
    cells.latency("unary_in_us", call, "take", workload.ARRAY)
    cells.latency("unary_out_us", call, "give")
    cells.latency("unary_echo_us", call, "echo", workload.ARRAY)
    cells.throughput("unary_throughput_per_s", lambda calls: pipeline(remote, calls))


def pipeline(remote: grpc.UnaryUnaryMultiCallable, calls: int) -> None:
    request = pickle.dumps(("noop", (b"x",)), protocol=5)
    flying: deque[grpc.Future] = deque()
    for _ in range(calls):
        if len(flying) == WINDOW:
            pickle.loads(flying.popleft().result())
        flying.append(remote.future(request))
    for future in flying:
        pickle.loads(future.result())


if __name__ == "__main__":
    run("grpc", measure)
