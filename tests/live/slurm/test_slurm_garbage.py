"""Slurm's own commands, slow, silent or garbled: open leases go on, and what is refused has words.

One site for all tests; each puts a wrapper of one command first on its PATH, and takes it away again.
"""

import concurrent.futures
import contextlib
import os
import shutil
import signal
import time

import pytest

from tests.live.sites import running_site
from tests.live.slurm import remote
from tests.live.slurm.conftest import FAST, agents_of, connected
from tests.live.waiting import wait_for

TICKS_S = 0.7  # a survey or two
REAL = '"$real" "$@"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("garbage")


@pytest.fixture(scope="module")
def site(cluster, folder):
    (folder / "bin").mkdir()
    settings = {"ISTHMUS_SLURM__COMMAND_TIMEOUT_S": "2", "ISTHMUS_SLURM__TICK_S": "0.3"}
    environ = {**cluster.environment, **FAST, **settings, "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    with running_site(folder / "state", "--platform", "slurm", **environ) as opened:
        yield opened
    wait_for(lambda: not cluster.our_jobs())
    assert agents_of(folder) == []


@pytest.fixture(scope="module")
def caller(site):
    with connected(site) as opened:
        yield opened


@pytest.fixture
def instead_of(folder):
    @contextlib.contextmanager
    def wrapped(tool, body):
        """While it lasts, `tool` is this line of shell; "$real" is the real one. Tells how often it began."""
        wrapper, marks = folder / "bin" / tool, folder / f"{tool}.began"
        marks.write_text("")
        made = folder / "bin" / f"{tool}.new"
        made.write_text(f"#!/bin/sh\necho >>{marks}\nreal={shutil.which(tool)}\n{body}\n")
        made.chmod(0o755)
        made.rename(wrapper)
        try:
            yield lambda: len(marks.read_text())
        finally:
            wrapper.unlink()

    return wrapped


def refusal(site, **request):
    """Why a reserved lease is refused."""
    with site.client() as client:
        answer = client.post("/v1/leases", json={"lease_class": "reserved", **request})
    assert answer.status_code == 503, answer.text
    return answer.json()["error"]["message"]


def nodes(site):
    with site.client() as client:
        return {node["node"]: node for node in client.get("/v1/nodes").json()}


GARBLED = {
    "squeue without separators": ("squeue", f"{REAL} | tr '|' ' '"),
    "squeue cut short": ("squeue", f"{REAL} | head -c -3"),
    "squeue without its jobs": ("squeue", f"{REAL} | sed '/RUNNING/d'"),
    "squeue with a broken letter": ("squeue", f"{REAL} | sed 's/RUNNING/RUN\\xffNING/'"),
    "squeue with a warning": ("squeue", f"{REAL}; echo 'squeue: warning: slow' >&2"),
    "sinfo that prints nothing": ("sinfo", "true"),
    "sinfo with numbers that are none": ("sinfo", f"{REAL} | tr 0-9 x"),
    "sinfo with a warning": ("sinfo", f"{REAL}; echo 'sinfo: warning: slow' >&2"),
    "scontrol cut short": ("scontrol", f"{REAL} | head -c 40"),
}


@pytest.mark.parametrize("fault", GARBLED)
def test_open_leases_and_the_list_of_nodes_stay_under(site, caller, instead_of, fault):
    job = caller.call(remote.where)["job"]
    with instead_of(*GARBLED[fault]) as count:
        wait_for(lambda: count() >= 2)  # the site asks again once it has read what it was told
        assert caller.call(remote.where)["job"] == job
        assert len(nodes(site)) == 6


def test_a_warning_keeps_nobody_from_reading_on(cluster, site, instead_of, batch_job):
    with instead_of("sinfo", f"{REAL}; echo 'sinfo: warning: slow' >&2"):
        batch_job("sleep 60", "-w", "n6", "-c3")
        wait_for(lambda: nodes(site)["n6"]["other_cores"] == 3)


def test_a_job_whose_number_salloc_garbles_is_refused_and_cancelled(cluster, site, caller, instead_of):
    job = int(caller.call(remote.where)["job"])
    with instead_of("salloc", f"{REAL} 2>&1 | tr 0-9 x >&2"):
        assert "salloc named no job" in refusal(site)
    wait_for(lambda: cluster.our_jobs() == [job])


def test_an_agent_that_does_not_start_is_refused_with_its_exit_code_and_its_job_goes(
    cluster, site, caller, instead_of
):
    job = int(caller.call(remote.where)["job"])
    with instead_of("srun", "exit 7"):
        words = refusal(site)
    assert "ended before it dialled the site: its step has exit code 7, 3 times in a row; see" in words
    wait_for(lambda: cluster.our_jobs() == [job])


def test_a_slow_scancel_leaves_no_job(cluster, site, instead_of):
    with connected(site) as isthmus_site:
        job = int(isthmus_site.call(remote.where)["job"])
        with instead_of("scancel", f"sleep 2.5; exec {REAL}") as count:
            isthmus_site.close()
            wait_for(count)
    wait_for(lambda: job not in cluster.our_jobs())


def test_without_munge_leases_go_on_and_new_ones_are_refused_with_words(cluster, site, caller):
    job = caller.call(remote.where)["job"]
    os.kill(int((cluster.directory / "munge" / "pid").read_text()), signal.SIGKILL)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            refused = pool.submit(refusal, site)
            while not refused.done():
                assert caller.call(remote.where)["job"] == job
                time.sleep(0.2)
        assert "did not answer in 2 s; slurmctld or munge may be down" in refused.result()
    finally:
        cluster.start()
    time.sleep(TICKS_S)
    assert caller.call(remote.where)["job"] == job
