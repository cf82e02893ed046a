"""Batch jobs that lend what they leave idle: by one line in their script, on their user's own account."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from isthmus.core.errors import NoCapacityError
from tests.live.slurm import remote
from tests.live.slurm.conftest import agents_of, connected
from tests.live.waiting import wait_for

PATIENT_S = 90.0  # harvested code runs when nobody else wants the cores, other tests among them


def lending(state, *then):
    """A job's script: it lends, then does its own work."""
    lines = [f"{sys.executable} -m isthmus lend --state {state} || exit 1", *then]
    return "\n".join(lines)


def lent_nodes(site):
    with site.client() as client:
        return {node["node"]: node for node in client.get("/v1/nodes").json() if node["platform"] == "lent"}


def ended(site):
    with site.client() as client:
        leases = client.get("/v1/leases?ended=1").json()
    return [(lease["end_reason"], lease["end_detail"]) for lease in leases if lease["end_reason"]]


def free_cores(site, job):
    """How many cores of the job are idle, as its agent sees it."""
    found = [node for name, node in lent_nodes(site).items() if name.endswith(f".job{job}")]
    return found[0]["cores"] - found[0]["other_cores"] if found else 0


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(Path("/tmp").glob("isthmus-lent-*"))
    yield
    wait_for(lambda: not set(Path("/tmp").glob("isthmus-lent-*")) - before)


def test_a_function_runs_on_the_idle_core_of_a_batch_job_at_idle_class(open_site, batch_job, tmp_path):
    with open_site() as site, connected(site) as isthmus_site:
        job = batch_job(lending(tmp_path / "state", "sleep 300"), "-c2", "--mem=1G")
        wait_for(lambda: free_cores(site, job) == 2, PATIENT_S)
        ran = isthmus_site.submit(remote.where_harvested).result(timeout_s=PATIENT_S)
        assert (ran["job"], ran["class"]) == (str(job), "idle")
        (node,) = lent_nodes(site).values()
        assert (node["labels"]["user"], node["labels"]["partition"]) == ("root", "batch")


def test_its_node_goes_with_the_job_and_calls_there_run_again_elsewhere(
    cluster, open_site, batch_job, tmp_path
):
    marks = tmp_path / "marks"
    with open_site() as site, connected(site) as isthmus_site:
        first = batch_job(lending(tmp_path / "state", "sleep 300"), "-c1", "--mem=1G")
        wait_for(lambda: free_cores(site, first) == 1, PATIENT_S)
        future = isthmus_site.submit(remote.slow_at_first_harvested, 6, str(marks))
        wait_for(lambda: marks.exists() and marks.read_text().split(), PATIENT_S)
        second = batch_job(lending(tmp_path / "state", "sleep 300"), "-c1", "--mem=1G")
        wait_for(lambda: free_cores(site, second) == 1, PATIENT_S)
        cluster.run("scancel", str(first))
        assert future.result(timeout_s=PATIENT_S) == 36
        assert marks.read_text().split() == [str(first), str(second)]
        assert "evicted" in {reason for reason, _ in ended(site)}
        wait_for(lambda: list(lent_nodes(site)) and free_cores(site, first) == 0, PATIENT_S)


def test_an_owner_that_needs_its_memory_has_it_back_and_the_call_runs_again_elsewhere(
    open_site, batch_job, tmp_path
):
    marks, wake = tmp_path / "marks", tmp_path / "wake"
    grow = f"{sys.executable} -c 'held = b\"x\" * (900 << 20); import time; time.sleep(300)'"
    with open_site() as site, connected(site) as isthmus_site:
        waking = lending(tmp_path / "state", f"until [ -e {wake} ]; do sleep 0.1; done", grow)
        owner = batch_job(waking, "-c1", "--mem=1G")
        wait_for(lambda: free_cores(site, owner) == 1, PATIENT_S)
        future = isthmus_site.submit(remote.slow_at_first_harvested, 7, str(marks))
        wait_for(lambda: marks.exists() and marks.read_text().split(), PATIENT_S)
        other = batch_job(lending(tmp_path / "state", "sleep 300"), "-c1", "--mem=1G")
        wait_for(lambda: free_cores(site, other) == 1, PATIENT_S)
        wake.touch()
        assert future.result(timeout_s=PATIENT_S) == 49
        assert marks.read_text().split() == [str(owner), str(other)]
        assert ("evicted", f"its owner, job {owner}, needs its memory") in ended(site)


def test_without_a_job_that_lends_a_harvested_request_waits_with_words(open_site):
    with open_site() as site, site.client() as client:
        error = client.post("/v1/leases", json={"lease_class": "harvested"}).json()["error"]
        assert error["code"] == NoCapacityError.__name__
        assert "no batch job lends its idle cores now" in error["message"]


def test_only_inside_a_job_can_be_lent(cluster, tmp_path):
    words = ("env", "-u", "SLURM_JOB_ID", sys.executable, "-m", "isthmus", "lend", "--state", str(tmp_path))
    with pytest.raises(Exception, match="returned non-zero") as failure:
        cluster.run(*words)
    assert "SLURM_JOB_ID is not set" in failure.value.stderr


def test_a_comment_in_a_script_of_any_language_lends_and_the_script_runs_as_it_is(
    cluster, open_site, tmp_path
):
    script, told = tmp_path / "job.py", tmp_path / "told"
    script.write_text(
        f"#!{sys.executable}\n#SBATCH -c1 --mem=1G -J own --output=/dev/null\n#ISTHMUS lend cores=auto\n"
        "import os, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.1)\n"
        f"open({str(told)!r}, 'w').write(os.environ['SLURM_JOB_NAME'])\nsys.exit(7)\n"
    )
    wake = tmp_path / "wake"
    with open_site() as site, connected(site) as isthmus_site:
        words = (
            "-m",
            "isthmus",
            "sbatch",
            "--state",
            str(tmp_path / "state"),
            "--json",
            str(script),
            str(wake),
        )
        job = json.loads(cluster.run(sys.executable, *words))["job"]
        wait_for(lambda: free_cores(site, job) == 1, PATIENT_S)
        ran = isthmus_site.submit(remote.where_harvested).result(timeout_s=PATIENT_S)
        assert (ran["job"], ran["class"]) == (str(job), "idle")
        (agent,) = agents_of(Path(f"/tmp/isthmus-lent-{job}-{ran['node']}"))
        os.kill(agent, signal.SIGKILL)
        wait_for(lambda: agents_of(Path(f"/tmp/isthmus-lent-{job}-{ran['node']}")) not in ([], [agent]))
        wait_for(lambda: free_cores(site, job) == 1, PATIENT_S)
        assert isthmus_site.submit(remote.where_harvested).result(timeout_s=PATIENT_S)["job"] == str(job)
        (node,) = lent_nodes(site).values()
        assert (node["labels"]["name"], node["labels"]["partition"]) == ("own", "batch")
        wake.touch()
        wait_for(lambda: "ExitCode=7:0" in cluster.run("scontrol", "show", "job", str(job)))
        assert told.read_text() == "own"
        wait_for(lambda: not lent_nodes(site), PATIENT_S)
