"""concurrent.futures.ProcessPoolExecutor with one worker: the standard library's own answer."""

import time

START_S = time.perf_counter()

from concurrent.futures import ProcessPoolExecutor  # noqa: E402

from benchmarks.harness.subject import Cells, pin_pair, run  # noqa: E402
from benchmarks.peers import workload  # noqa: E402


def measure(cells: Cells) -> None:
    with ProcessPoolExecutor(1) as pool:
        pool.submit(workload.noop, b"x").result()
        cells.value("first_s", time.perf_counter() - START_S)
        cells.notes.append(pin_pair({pool.submit(workload.process_id).result()}))
        workload.check_echo(pool.submit(workload.echo, workload.ARRAY).result())
        cells.latency("submit_noop_us", lambda: pool.submit(workload.noop, b"x").result())
        cells.latency("submit_in_us", lambda: pool.submit(workload.take, workload.ARRAY).result())
        cells.latency("submit_out_us", lambda: pool.submit(workload.give).result())
        cells.latency("submit_echo_us", lambda: pool.submit(workload.echo, workload.ARRAY).result())
        cells.throughput(
            "submit_throughput_per_s",
            lambda calls: [
                future.result() for future in [pool.submit(workload.noop, b"x") for _ in range(calls)]
            ],
        )


if __name__ == "__main__":
    run("pool", measure)
