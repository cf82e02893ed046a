"""Nodes and jobs that operators and faults take away for good or for a while."""

import os
import signal
import time

import pytest

from isthmus.core.errors import ExecutorLostError
from tests.live.slurm import remote
from tests.live.slurm.conftest import agents_of, connected
from tests.live.waiting import wait_for

BEHIND_S = 7200
SHIFTED = {
    "squeue": f"awk -F'|' -v OFS='|' '$7 ~ /^[0-9]+$/ {{ $7 -= {BEHIND_S} }} 1'",
    "sdiag": f'awk \'/^sdiag output/ {{ gsub(/[()]/, "", $NF); $NF = "(" $NF - {BEHIND_S} ")" }} 1\'',
}


def node_of(site, name):
    with site.client() as client:
        return next(node for node in client.get("/v1/nodes").json() if node["node"] == name)


def leases(site, ended=False):
    with site.client() as client:
        return client.get("/v1/leases?ended=1" if ended else "/v1/leases").json()


def test_a_drained_node_keeps_its_lease_gets_no_other_and_says_why(cluster, open_site):
    with open_site() as site, connected(site) as isthmus_site:
        ran = isthmus_site.call(remote.where)
        drain = ("scontrol", "update", f"nodename={ran['node']}", "state=drain")
        try:
            cluster.run(*drain, "reason=disk is full\nask me")
            wait_for(lambda: "disk is full ask me" in node_of(site, ran["node"])["draining_why"])
            assert isthmus_site.call(remote.where) == ran
            assert isthmus_site.call(remote.where_reserved)["node"] != ran["node"]
            cluster.run(*drain, "reason= ")
            wait_for(lambda: "Slurm says no reason" in node_of(site, ran["node"])["draining_why"])
        finally:
            cluster.run("scontrol", "update", f"nodename={ran['node']}", "state=resume")


def test_with_its_slurmd_lost_a_node_loses_lease_call_and_agent(cluster, open_site, tmp_path):
    """Slurm can end nothing there: the site does."""
    marks = tmp_path / "marks"
    with open_site() as site, connected(site) as isthmus_site:
        ran = isthmus_site.call(remote.where)
        with cluster.without_slurmd(ran["node"]):
            assert isthmus_site.call(remote.where) == ran
            future = isthmus_site.submit(remote.slow_square, 3, str(marks), 60.0)
            wait_for(marks.exists)
            cluster.run("scontrol", "update", f"nodename={ran['node']}", "state=down", "reason=lost")
            with pytest.raises(ExecutorLostError, match=r"its node failed \(NODE_FAIL.*it may have run"):
                future.result(timeout_s=30)
            (lease,) = leases(site, ended=True)
            assert lease["end_reason"] == "node_lost"
            wait_for(lambda: agents_of(tmp_path) == [])
            assert node_of(site, ran["node"])["draining_why"] == "down: lost"


def test_a_call_survives_a_suspension_longer_than_its_lease_lives(cluster, open_site, tmp_path):
    marks = tmp_path / "marks"
    with open_site(ISTHMUS_LEASING__LEASE_S="4") as site, connected(site) as isthmus_site:
        future = isthmus_site.submit(remote.slow_steps, 3, str(marks), 4.0)
        wait_for(marks.exists)
        job = marks.read_text().split()[0]
        cluster.run("scontrol", "suspend", job)
        time.sleep(7.0)  # Slurm stops the processes after two; then a lease's life passes
        assert not future.done()
        cluster.run("scontrol", "resume", job)
        assert future.result(timeout_s=30) == 9
        assert [lease["state"] for lease in leases(site)] == ["active"]
    assert marks.read_text().split() == [job]


def test_a_slurmctld_whose_clock_is_hours_behind_ends_no_lease(cluster, open_site, tmp_path):
    """Only a site that finds its jobs again must take the times of Slurm's books."""
    (tmp_path / "bin").mkdir()
    for tool, shift in SHIFTED.items():
        wrapper = tmp_path / "bin" / tool
        wrapper.write_text(f'#!/bin/sh\n{cluster.run("which", tool).strip()} "$@" | {shift}\n')
        wrapper.chmod(0o755)
    with open_site() as first, connected(first) as isthmus_site:
        ran = isthmus_site.call(remote.where)
        first.stop(signal.SIGKILL)
        with open_site(PATH=f"{tmp_path}/bin:{os.environ['PATH']}") as second:
            wait_for(lambda: [lease["state"] for lease in leases(second)] == ["active"])
            time.sleep(1.5)  # several ticks
            assert [lease["state"] for lease in leases(second)] == ["active"]
            assert isthmus_site.call(remote.where) == ran
            assert cluster.our_jobs() == [int(ran["job"])]
