"""Dask-jobqueue: from asking for a job of one worker to its first result. Prints milliseconds.

Its scheduler runs, and the client is connected, before the clock starts, as with our site. SLURMCluster
submits a batch job, in which the worker starts.
"""

import os
import sys
import tempfile
import time

from dask_jobqueue import SLURMCluster
from distributed import Client

from benchmarks.peers import workload


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="dask-") as folder,
        SLURMCluster(
            queue="batch", cores=1, processes=1, memory="1GB", walltime="00:05:00", python=sys.executable,
            local_directory=folder, log_directory=folder, job_script_prologue=[f"cd {os.getcwd()}"],
            scheduler_options={"host": "127.0.0.1", "dashboard_address": None}, silence_logs=40,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        start_s = time.perf_counter()
        cluster.scale(1)
        client.submit(workload.noop, b"x", pure=False).result()
        print((time.perf_counter() - start_s) * 1e3)


if __name__ == "__main__":
    main()
