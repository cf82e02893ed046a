"""Who the owner of lent cores is, what it lends, and what it uses."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from isthmus.node.idling import make_idle
from isthmus.node.owners import LENT, SAMPLES, Owner, group_members, job_group, lent_by, thread_wants_ns

GIB = 2**30
JOB = {
    "SLURM_JOB_ID": "42",
    "SLURM_CPUS_ON_NODE": "4",
    "SLURM_MEM_PER_NODE": "8192",
    "SLURMD_NODENAME": "n7",
    "SLURM_JOB_USER": "ada",
    "SLURM_JOB_PARTITION": "batch",
    "SLURM_JOB_ACCOUNT": "phys",
    "SLURM_JOB_NAME": "cfd",
    "SLURM_JOB_QOS": "night",
}


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that say a line once they run, with variables as keywords."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, **variables: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", f"print('here', flush=True)\n{code}"],
            stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env={**os.environ, **variables},
        )  # fmt: skip
        started.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        return child

    yield run
    for child in started:
        child.kill()
        child.communicate()


def test_auto_lends_all_that_the_job_holds() -> None:
    lent = lent_by(JOB, "auto", "auto")
    assert (lent.job, lent.node) == ("42", "n7")
    assert (lent.cores, lent.memory_bytes, lent.held_bytes) == (4, 8 * GIB, 8 * GIB)


def test_rules_can_be_told_whose_job_it_is_and_which() -> None:
    lent = lent_by(JOB, "auto", "auto")
    assert (lent.user, lent.account, lent.partition) == ("ada", "phys", "batch")
    assert (lent.name, lent.qos) == ("cfd", "night")


def test_a_part_may_be_lent() -> None:
    lent = lent_by(JOB, "2", "1GiB")
    assert (lent.cores, lent.memory_bytes, lent.held_bytes) == (2, GIB, 8 * GIB)


def test_memory_per_core_counts_for_all_cores() -> None:
    per_core = {**JOB, "SLURM_MEM_PER_NODE": "", "SLURM_MEM_PER_CPU": "1024"}
    assert lent_by(per_core, "auto", "auto").memory_bytes == 4 * GIB


@pytest.mark.parametrize(
    ("environ", "cores", "memory", "complaint"),
    [
        ({}, "auto", "auto", "SLURM_JOB_ID is not set"),
        (JOB, "5", "auto", "holds 4 cores and 8.0 GiB here; it cannot lend cores=5"),
        (JOB, "0", "auto", "cannot lend cores=0"),
        (JOB, "auto", "9GiB", "cannot lend cores=auto memory=9GiB"),
        (JOB, "many", "auto", "many"),
    ],
)
def test_what_cannot_be_lent_is_refused(
    environ: dict[str, str], cores: str, memory: str, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        lent_by(environ, cores, memory)


@pytest.mark.parametrize(
    ("own", "mounts", "group"),
    [
        (
            "0::/system.slice/slurmstepd.scope/job_42/step_0/user/task_0",
            {"": Path("/c")},
            "/c/system.slice/slurmstepd.scope/job_42",
        ),
        (
            "4:memory:/slurm/uid_1000/job_42/step_batch\n3:cpuset:/slurm/uid_1000/job_42/step_batch",
            {"cpuset": Path("/c/cpuset")},
            "/c/cpuset/slurm/uid_1000/job_42",
        ),
        ("0::/user.slice", {"": Path("/c")}, None),
        ("0::/slurm/job_421/step_0", {"": Path("/c")}, None),
    ],
)
def test_the_jobs_cgroup_is_found_in_both_versions(
    own: str, mounts: dict[str, Path], group: str | None
) -> None:
    found = job_group("42", own, mounts)
    assert (None if found is None else str(found)) == group


def test_a_group_s_members_are_those_of_all_groups_below(tmp_path: Path) -> None:
    for name, pids in (("job_1", ""), ("job_1/step_0", "5\n6\n"), ("job_1/step_0/task_0", "7\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text(pids)
    assert group_members(tmp_path / "job_1") == {5, 6, 7}


def test_the_owner_is_who_carries_the_job_s_number_and_not_what_isthmus_runs_in_it(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    busy = "while True: pass"
    owner_process = start(busy, SLURM_JOB_ID="4242")
    start(busy, SLURM_JOB_ID="4242", **{LENT: "1"})  # a guest
    start(busy, SLURM_JOB_ID="42421")  # a stranger
    owner = Owner("4242")
    owner.find()
    assert owner.sample(time.monotonic_ns()).cores == 0.0
    spent_ns = sum(thread_wants_ns(owner_process.pid).values())
    while sum(thread_wants_ns(owner_process.pid).values()) - spent_ns < 30_000_000:
        time.sleep(0.01)
    use = owner.sample(time.monotonic_ns())
    assert use.cores > 0.0
    assert 0 < use.memory_bytes < 2**30
    owner_process.kill()
    owner_process.wait()
    for _ in range(SAMPLES):  # what it wanted a moment ago counts a little longer
        use = owner.sample(time.monotonic_ns())
    assert use == (0.0, 0)


def test_idle_processes_are_in_the_idle_class_with_all_that_they_start(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    code = "import os; input(); print(os.sched_getscheduler(0) == os.SCHED_IDLE, os.fork() >= 0, flush=True)"
    child = start(code + "; print(os.sched_getscheduler(0) == os.SCHED_IDLE)")
    make_idle(child.pid)
    said, _ = child.communicate("\n", timeout=60)
    assert said.count("True") >= 4
    assert "False" not in said
    make_idle(child.pid)  # gone by now
