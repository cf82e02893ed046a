"""Ray: task and actor, one local node. Its results come by reference, so `ray.get` is part of a call."""

import time

START_S = time.perf_counter()

import os  # noqa: E402
import tempfile  # noqa: E402

os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

import ray  # noqa: E402

from benchmarks.harness.subject import Cells, pin_pair, run  # noqa: E402
from benchmarks.peers import workload  # noqa: E402


class Actor:
    def noop(self, value: bytes) -> bytes:
        return value

    def take(self, array: object) -> None: ...

    def give(self) -> object:
        return workload.give()

    def echo(self, array: object) -> object:
        return array

    def process_id(self) -> int:
        return os.getpid()


def measure(cells: Cells) -> None:
    cells.versions["ray"] = ray.__version__
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             object_store_memory=256 * 2**20, _temp_dir=tempfile.gettempdir())  # fmt: skip
    try:
        noop = ray.remote(workload.noop)
        ray.get(noop.remote(b"x"))
        cells.value("first_s", time.perf_counter() - START_S)
        measure_tasks(cells, noop)
        measure_actor(cells)
    finally:
        ray.shutdown()


def measure_tasks(cells: Cells, noop: object) -> None:
    if not cells.wants("task_noop_us", "task_in_us", "task_echo_us", "task_throughput_per_s"):
        return
    process_id = ray.remote(workload.process_id)
    cells.notes.append("task: " + pin_pair({ray.get(process_id.remote()) for _ in range(5)}))
    take, echo = ray.remote(workload.take), ray.remote(workload.echo)
    workload.check_echo(ray.get(echo.remote(workload.ARRAY)))
    cells.latency("task_noop_us", lambda: ray.get(noop.remote(b"x")))
    cells.latency("task_in_us", lambda: ray.get(take.remote(workload.ARRAY)))
    cells.latency("task_echo_us", lambda: ray.get(echo.remote(workload.ARRAY)))
    cells.throughput(
        "task_throughput_per_s", lambda calls: ray.get([noop.remote(b"x") for _ in range(calls)])
    )


def measure_actor(cells: Cells) -> None:
    if not cells.wants(
        "actor_noop_us", "actor_in_us", "actor_out_us", "actor_echo_us", "actor_throughput_per_s"
    ):
        return
    actor = ray.remote(num_cpus=0)(Actor).remote()
    cells.notes.append("actor: " + pin_pair({ray.get(actor.process_id.remote())}))
    workload.check_echo(ray.get(actor.echo.remote(workload.ARRAY)))
    cells.latency("actor_noop_us", lambda: ray.get(actor.noop.remote(b"x")))
    cells.latency("actor_in_us", lambda: ray.get(actor.take.remote(workload.ARRAY)))
    cells.latency("actor_out_us", lambda: ray.get(actor.give.remote()))
    cells.latency("actor_echo_us", lambda: ray.get(actor.echo.remote(workload.ARRAY)))
    cells.throughput(
        "actor_throughput_per_s", lambda calls: ray.get([actor.noop.remote(b"x") for _ in range(calls)])
    )


if __name__ == "__main__":
    run("ray", measure)
