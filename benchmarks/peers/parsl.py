"""Parsl's HighThroughputExecutor: interchange, one manager, one worker process."""

import time

START_S = time.perf_counter()

import os  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402

import parsl  # noqa: E402
from parsl.config import Config  # noqa: E402
from parsl.executors import HighThroughputExecutor  # noqa: E402
from parsl.providers import LocalProvider  # noqa: E402

from benchmarks.harness.subject import Cells, pin_pair, run  # noqa: E402
from benchmarks.peers import workload  # noqa: E402


def configuration() -> Config:
    engine = HighThroughputExecutor(
        label="htex", address="127.0.0.1", max_workers_per_node=1, encrypted=False, cores_per_worker=1,
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )  # fmt: skip
    return Config(executors=[engine], strategy="none", usage_tracking=0, initialize_logging=False,
                  run_dir=tempfile.mkdtemp(prefix="runinfo"))  # fmt: skip


def measure(cells: Cells) -> None:
    cells.versions["parsl"] = parsl.__version__
    os.environ["PATH"] = (
        os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    )  # for interchange.py
    with parsl.load(configuration()):
        noop = parsl.python_app(workload.noop)
        noop(b"x").result()
        cells.value("first_s", time.perf_counter() - START_S)
        take, give, echo, process_id = (
            parsl.python_app(function)
            for function in (workload.take, workload.give, workload.echo, workload.process_id)
        )
        cells.notes.append(pin_pair({process_id().result()}))
        workload.check_echo(echo(workload.ARRAY).result())
        cells.latency("htex_noop_us", lambda: noop(b"x").result())
        cells.latency("htex_in_us", lambda: take(workload.ARRAY).result())
        cells.latency("htex_out_us", lambda: give().result())
        cells.latency("htex_echo_us", lambda: echo(workload.ARRAY).result())
        cells.throughput(
            "htex_throughput_per_s",
            lambda calls: [future.result() for future in [noop(b"x") for _ in range(calls)]],
        )


if __name__ == "__main__":
    run("parsl", measure)
