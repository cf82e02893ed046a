"""HyperQueue on Slurm: from asking for an allocation to the end of its first task. Prints milliseconds.

Its Python package has the server and a worker, both in the calling process, but not the program `hq`, which
asks Slurm by itself (`hq alloc`) and is in no package registry. So what is timed is salloc and an srun of
this file with `work` in the allocation: server, worker, and one task. Its result is a file, looked for every
millisecond, since the package's own wait looks once a second.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = ("--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--mem=1024M")


def work() -> None:
    """In the allocation."""
    from hyperqueue import Job, LocalCluster
    from hyperqueue.cluster import WorkerConfig

    with tempfile.TemporaryDirectory(prefix="hq-") as folder, LocalCluster(folder) as cluster:
        cluster.start_worker(WorkerConfig(cores=1))
        client = cluster.client()
        result = Path(folder) / "result"
        job = Job(folder)
        job.program(["touch", str(result)])
        submitted = client.submit(job)
        while not result.exists():
            time.sleep(0.001)
        print(time.monotonic())  # the same clock on all of one machine; what follows is its shutting down
        client.wait_for_jobs([submitted])


def main() -> None:
    start_s = time.monotonic()
    said = _run("salloc", "--no-shell", "--job-name=hyperqueue", "--time=5", *SHAPE)
    job = said.split()[-1]
    try:
        step = (
            "srun",
            f"--jobid={job}",
            "--overlap",
            sys.executable,
            "-m",
            "benchmarks.peers.slurm_hyperqueue",
        )
        print((float(_run(*step, "work").split()[-1]) - start_s) * 1e3)
    finally:
        _run("scancel", job)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stderr + done.stdout


if __name__ == "__main__":
    work() if sys.argv[1:] == ["work"] else main()
