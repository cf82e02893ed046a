"""ZeroMQ REQ/REP over ipc with pickle 5 and out-of-band buffers: the usual hand-made call."""

import time

START_S = time.perf_counter()

import multiprocessing  # noqa: E402
import pickle  # noqa: E402
import tempfile  # noqa: E402

import zmq  # noqa: E402

from benchmarks.harness.subject import Cells, pin_pair, run  # noqa: E402
from benchmarks.peers import workload  # noqa: E402

WINDOW = 256  # requests in flight when pipelined: as many as an isthmus channel has credits


def encode(value: object) -> list[bytes | pickle.PickleBuffer]:
    buffers: list[pickle.PickleBuffer] = []
    return [pickle.dumps(value, protocol=5, buffer_callback=buffers.append), *buffers]


def decode(parts: list) -> object:
    return pickle.loads(parts[0], buffers=parts[1:])


def serve(address: str) -> None:
    """Answer requests until one is empty."""
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(address)
        while True:
            parts = [memoryview(part) for part in socket.recv_multipart(copy=False)]
            if not parts[0].nbytes:
                socket.send(b"")
                return
            name, arguments = decode(parts)
            socket.send_multipart(encode(getattr(workload, name)(*arguments)), copy=False)


def measure(cells: Cells) -> None:
    cells.versions |= {"pyzmq": zmq.__version__, "libzmq": zmq.zmq_version()}
    address = f"ipc://{tempfile.mkdtemp()}/zmq"
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(address,))
    server.start()
    try:
        with zmq.Context() as context:
            measure_client(cells, context, address)
        server.join(10)
    finally:
        server.kill()


def measure_client(cells: Cells, context: zmq.Context, address: str) -> None:
    with context.socket(zmq.REQ) as socket:
        socket.connect(address)

        def call(name: str, *arguments: object) -> object:
            socket.send_multipart(encode((name, arguments)), copy=False)
            return decode(socket.recv_multipart(copy=False))

        call("noop", b"x")
        cells.value("first_s", time.perf_counter() - START_S)
        cells.notes.append(pin_pair({call("process_id")}))
        workload.check_echo(call("echo", workload.ARRAY))
        cells.latency("req_noop_us", call, "noop", b"x")
        cells.latency("req_in_us", call, "take", workload.ARRAY)
        cells.latency("req_out_us", call, "give")
        cells.latency("req_echo_us", call, "echo", workload.ARRAY)
        with context.socket(zmq.DEALER) as dealer:
            dealer.connect(address)
            cells.throughput("dealer_throughput_per_s", lambda calls: pipeline(dealer, calls))
        socket.send(b"")
        socket.recv()


def pipeline(dealer: zmq.Socket, calls: int) -> None:
    """DEALER may have many requests in flight; the server is the same REP socket."""
    request = [b"", *encode(("noop", (b"x",)))]
    for number in range(calls + WINDOW):
        if number >= WINDOW:
            decode(dealer.recv_multipart()[1:])
        if number < calls:
            dealer.send_multipart(request)


if __name__ == "__main__":
    run("zmq", measure)
