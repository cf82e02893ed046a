"""Dask distributed: submit and actor, one local worker process with one thread."""

import time

START_S = time.perf_counter()

import os  # noqa: E402
import tempfile  # noqa: E402

from distributed import Client, LocalCluster, __version__  # noqa: E402

from benchmarks.harness.subject import Cells, pin_pair, run  # noqa: E402
from benchmarks.peers import workload  # noqa: E402


class Actor:
    def noop(self, value: bytes) -> bytes:
        return value

    def take(self, array: object) -> None: ...

    def process_id(self) -> int:
        return os.getpid()


def measure(cells: Cells) -> None:
    cells.versions["distributed"] = __version__
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None,
                     local_directory=tempfile.gettempdir(), silence_logs=40) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        client.submit(workload.noop, b"x", pure=False).result()
        cells.value("first_s", time.perf_counter() - START_S)
        cells.notes.append(pin_pair({client.submit(workload.process_id, pure=False).result()}))
        measure_submit(cells, client)
        measure_actor(cells, client)


def measure_submit(cells: Cells, client: Client) -> None:
    workload.check_echo(client.submit(workload.echo, workload.ARRAY, pure=False).result())
    cells.latency("submit_noop_us", lambda: client.submit(workload.noop, b"x", pure=False).result())
    cells.latency("submit_in_us", lambda: client.submit(workload.take, workload.ARRAY, pure=False).result())
    cells.latency("submit_out_us", lambda: client.submit(workload.give, pure=False).result())
    cells.latency("submit_echo_us", lambda: client.submit(workload.echo, workload.ARRAY, pure=False).result())
    cells.throughput(
        "submit_throughput_per_s",
        lambda calls: client.gather([client.submit(workload.noop, b"x", pure=False) for _ in range(calls)]),
    )


def measure_actor(cells: Cells, client: Client) -> None:
    if not cells.wants("actor_noop_us", "actor_in_us"):
        return
    actor = client.submit(Actor, actor=True, pure=False).result()
    cells.latency("actor_noop_us", lambda: actor.noop(b"x").result())
    cells.latency("actor_in_us", lambda: actor.take(workload.ARRAY).result())


if __name__ == "__main__":
    run("dask", measure)
