"""Allocations that stand ready: leases there at once, more and fewer of them, handed over and handed back."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from isthmus.node.isolation import state_tag
from tests.live.slurm import remote
from tests.live.slurm.conftest import agents_of, connected
from tests.live.slurm.test_slurm_faults import jobs_seen
from tests.live.waiting import wait_for


def pool(**settings):
    """Settings of the pool `burst`, as variables."""
    shape = {"cores": 2, "memory": "1GiB", "partition": "scavenge", "minimum": 1, "maximum": 1}
    return {
        f"ISTHMUS_SLURM__POOLS__BURST__{name.upper()}": f"{value}"
        for name, value in (shape | settings).items()
    }


def report(site):
    with site.client() as client:
        (row,) = client.get("/v1/status").json()["pools"]
    return row


def typed(site, *words):
    """What a command of isthmus prints."""
    command = (sys.executable, "-m", "isthmus", *words, "--state", str(site.state))
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def ready(site, count=1):
    """So many of its allocations take leases."""
    return report(site)["cores_free"] + report(site)["leases"] >= 2 * count


def pool_jobs(cluster, states="PD,R"):
    lines = cluster.run("squeue", "-h", "-t", states, "-o", "%A %j").splitlines()
    return [int(line.split()[0]) for line in lines if line.endswith("isthmus-pool-burst")]


def test_a_lease_on_a_standing_allocation_needs_no_job_of_its_own(cluster, open_site):
    with open_site(**pool()) as site, connected(site) as isthmus_site:
        wait_for(lambda: ready(site))
        (job,) = pool_jobs(cluster)
        assert isthmus_site.call(remote.where)["job"] == str(job)
        assert cluster.our_jobs() == [job]
        with site.client() as client:
            (lease,) = client.get("/v1/leases").json()
            nodes = {node["node"]: node for node in client.get("/v1/nodes").json()}
        assert (lease["node"].split(".")[1:], lease["agent"]) == (["burst", str(job)], None)
        assert (nodes[lease["node"]]["platform"], nodes[lease["node"]]["labels"]["pool"]) == ("pool", "burst")
        reserved = isthmus_site.call(remote.where_reserved)["job"]
        assert reserved != str(job), "what its owner alone may end is not in what batch may take back"
        assert report(site)["leases"] == 1


def test_a_pool_grows_when_it_has_no_room_and_shrinks_when_nobody_calls(cluster, open_site):
    request = {"resources": {"cores": 2, "memory": "256MiB"}}
    with open_site(**pool(minimum=0, maximum=2)) as site, site.client() as client:
        assert pool_jobs(cluster) == []
        first = client.post("/v1/leases", json=request).json()["grants"][0]
        assert ".burst." not in first["node"], "nothing stood ready, so it got a job of its own"
        wait_for(lambda: ready(site))
        second = client.post("/v1/leases", json=request).json()["grants"][0]
        assert ".burst." in second["node"]
        for grant in (first, second):
            client.delete(f"/v1/leases/{grant['lease']}")
        assert len(pool_jobs(cluster)) == 1
        wait_for(lambda: [path.name[:5] for path in (site.state / "agents").iterdir()] == ["pool-"])
        site.stop(signal.SIGKILL)
    with open_site(**pool(minimum=0, idle_s=0.5)):
        wait_for(lambda: not pool_jobs(cluster))


def test_a_killed_site_finds_its_pool_again_with_the_leases_on_it(cluster, open_site):
    with open_site(**pool()) as first, connected(first) as isthmus_site:
        wait_for(lambda: ready(first))
        jobs = pool_jobs(cluster)
        assert isthmus_site.call(remote.where)["job"] == str(jobs[0])
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        with open_site(**pool()) as second:
            wait_for(lambda: report(second)["leases"] == 1 and report(second)["running"] == 1)
            assert isthmus_site.call(remote.where)["job"] == str(jobs[0])
            assert pool_jobs(cluster) == jobs, "nothing is submitted twice"


def test_a_dead_slurmctld_changes_nothing_for_a_pool(cluster, open_site):
    with open_site(**pool(), ISTHMUS_SLURM__COMMAND_TIMEOUT_S="2") as site, connected(site) as isthmus_site:
        wait_for(lambda: ready(site))
        jobs = pool_jobs(cluster)
        cluster.wait_until_saved(jobs[0])
        with cluster.without_controller():
            wait_for(lambda: "Slurm does not answer" in "".join(report(site)["words"]))
            assert isthmus_site.call(remote.where)["job"] == str(jobs[0])
        wait_for(lambda: report(site)["words"] == [])
        assert isthmus_site.call(remote.where)["job"] == str(jobs[0])
        assert pool_jobs(cluster) == jobs, "nothing is submitted twice"


def test_an_agent_that_is_killed_is_started_again_in_its_job_and_its_leases_go_on(
    cluster, open_site, tmp_path
):
    with open_site(**pool()) as site, connected(site) as isthmus_site:
        wait_for(lambda: ready(site))
        jobs = pool_jobs(cluster)
        assert isthmus_site.call(remote.where)["job"] == str(jobs[0])
        (agent,) = agents_of(tmp_path)
        os.kill(agent, signal.SIGKILL)
        wait_for(lambda: agents_of(tmp_path) not in ([], [agent]))
        assert isthmus_site.call(remote.where)["job"] == str(jobs[0])
        assert (pool_jobs(cluster), report(site)["leases"]) == (jobs, 1)
    tag = state_tag(tmp_path / "state" / "agents" / f"pool-{jobs[0]}")
    wait_for(lambda: not list(Path("/dev/shm").glob(f"isthmus-*-{tag}")))  # the last agent leaves nothing


def test_two_sites_keep_to_their_own_pools(cluster, open_site, tmp_path):
    with open_site(**pool()) as first, open_site(tmp_path / "state" / "second", **pool()) as second:
        wait_for(lambda: ready(first) and ready(second))
        with connected(first) as one, connected(second) as two:
            jobs = {one.call(remote.where)["job"], two.call(remote.where)["job"]}
        assert jobs == {str(job) for job in pool_jobs(cluster)}
        assert second.stop() == 0
        assert len(pool_jobs(cluster)) == 1
        assert ready(first)


def test_a_preempted_allocation_comes_back_by_itself_and_its_calls_move_on(
    cluster, open_site, batch_job, tmp_path
):
    marks = tmp_path / "marks"
    with open_site(**pool(partition="returning")) as site, connected(site) as isthmus_site:
        wait_for(lambda: ready(site))
        (job,) = pool_jobs(cluster)
        future = isthmus_site.submit(remote.slow_at_first, 7, str(marks))
        wait_for(lambda: jobs_seen(marks))
        urgent = batch_job("sleep 60", "-p", "urgent", "-N6", "--exclusive")
        wait_for(lambda: urgent in cluster.jobs())
        wait_for(lambda: report(site)["waiting"] == 1)
        assert any(words.startswith(f"job {job} waits: ") for words in report(site)["words"])
        cluster.run("scancel", f"{urgent}")
        assert future.result(timeout_s=30) == 49
        cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm would wait two minutes
        wait_for(lambda: ready(site))
        assert pool_jobs(cluster) == [job]


def test_a_draining_pool_goes_when_batch_waits_and_comes_back_when_it_has_what_it_needs(
    cluster, open_site, batch_job, tmp_path
):
    marks = tmp_path / "marks"
    elsewhere = {"ISTHMUS_SLURM__ELASTIC_PARTITION": "scavenge"}
    with (
        open_site(**elsewhere, **pool(partition="batch", contract="drain", maximum=2)) as site,
        connected(site) as isthmus_site,
    ):
        wait_for(lambda: ready(site))
        (job,) = pool_jobs(cluster)
        future = isthmus_site.submit(remote.slow_at_first, 8, str(marks))
        wait_for(lambda: jobs_seen(marks) == [str(job)])
        waiting = batch_job("sleep 60", "-N6", "--exclusive")
        wait_for(lambda: waiting in cluster.jobs())
        assert pool_jobs(cluster) == [], "all of it was handed back, its minimum too"
        more = batch_job("sleep 60", "-N6", "--exclusive")
        wait_for(lambda: f"batch jobs come first, and some wait ({more})" in report(site)["words"])
        with site.client() as client:
            (lease,) = [lease for lease in client.get("/v1/leases?ended=1").json() if lease["allocation"]][
                -1:
            ]
            told = client.get(f"/v1/explain/{lease['lease']}").json()["words"]
        assert any("DrainOrdered" in line and "batch jobs come first" in line for line in told), told
        cluster.run("scancel", f"{waiting}", f"{more}")
        assert future.result(timeout_s=30) == 64
        wait_for(lambda: ready(site))


def test_a_suspended_allocation_keeps_its_leases_gets_no_new_ones_and_goes_on(cluster, open_site):
    """`scontrol suspend` is what Slurm does when it preempts with PreemptMode=SUSPEND."""
    with open_site(**pool(contract="suspend")) as site, connected(site) as isthmus_site:
        wait_for(lambda: ready(site))
        (job,) = pool_jobs(cluster)
        assert isthmus_site.call(remote.where)["job"] == str(job)
        cluster.run("scontrol", "suspend", f"{job}")
        wait_for(lambda: "batch jobs have its cores" in "".join(report(site)["words"]))
        future = isthmus_site.submit(remote.square, 5)
        with site.client() as client:
            wait_for(
                lambda: all(
                    node["draining"] for node in client.get("/v1/nodes").json() if node["platform"] == "pool"
                )
            )
            other = client.post("/v1/leases", json={}).json()["grants"][0]
            client.delete(f"/v1/leases/{other['lease']}")
        assert ".burst." not in other["node"]
        assert (report(site)["cores_free"], report(site)["leases"]) == (0, 1)
        cluster.run("scontrol", "resume", f"{job}")
        assert future.result(timeout_s=30) == 25
        wait_for(lambda: report(site)["cores_free"] > 0)
        assert isthmus_site.call(remote.where)["job"] == str(job)


def test_another_takes_an_allocations_place_before_its_time_limit(cluster, open_site):
    with open_site(**pool(time_limit_s=600)) as site, connected(site) as isthmus_site:
        wait_for(lambda: ready(site))
        (old,) = pool_jobs(cluster)
        assert isthmus_site.call(remote.where)["job"] == str(old)
        cluster.run("scontrol", "update", f"jobid={old}", "timelimit=4")

        def has_moved():
            isthmus_site.call(remote.square, 2)
            with site.client() as client:
                nodes = client.get("/v1/nodes").json()
            return [node["draining"] for node in nodes if node["platform"] == "pool"] == [True, False]

        wait_for(has_moved)
        assert isthmus_site.call(remote.where)["job"] == str(old), "what has begun there may end there"
        isthmus_site.close()
        wait_for(lambda: old not in pool_jobs(cluster))
        assert len(pool_jobs(cluster)) == 1


def test_a_pool_that_slurm_refuses_says_so(open_site):
    with open_site(**pool(partition="nowhere")) as site:
        wait_for(lambda: "Invalid partition" in "".join(report(site)["words"]))
        said = typed(site, "explain", "burst")
        assert said.startswith(
            "0 of 1 to 1 allocations (requeue), 0 of 0 cores free, 0 leases\nsbatch failed: "
        )
        assert "pool burst" in typed(site, "status")
