"""Parsl on Slurm: from asking for a block of one worker to its first result. Prints milliseconds.

Its interchange runs before the clock starts, as our site does. SlurmProvider submits a batch job, in which
the worker pool starts.
"""

import os
import sys
import tempfile
import time

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.launchers import SimpleLauncher
from parsl.providers import SlurmProvider

from benchmarks.peers import workload


def main() -> None:
    programs = os.path.dirname(sys.executable)
    os.environ["PATH"] = programs + os.pathsep + os.environ["PATH"]  # for interchange.py
    with tempfile.TemporaryDirectory(prefix="parsl-") as folder:
        engine = HighThroughputExecutor(
            label="htex", address="127.0.0.1", max_workers_per_node=1, encrypted=False, cores_per_worker=1,
            provider=SlurmProvider(
                partition="batch", nodes_per_block=1, cores_per_node=1, mem_per_node=1, init_blocks=0,
                min_blocks=0, max_blocks=1, walltime="00:05:00", exclusive=False, launcher=SimpleLauncher(),
                worker_init=f"export PATH={programs}:$PATH",
            ),
        )  # fmt: skip
        config = Config(executors=[engine], strategy="none", usage_tracking=0, initialize_logging=False,
                        run_dir=folder)  # fmt: skip
        with parsl.load(config):
            noop = parsl.python_app(workload.noop)
            start_s = time.perf_counter()
            engine.scale_out_facade(1)
            noop(b"x").result()
            print((time.perf_counter() - start_s) * 1e3)


if __name__ == "__main__":
    main()
