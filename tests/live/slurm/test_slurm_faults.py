"""What happens to leases when Slurm, its users or its jobs take things away: right state, right words."""

import os
import signal
import time

import pytest

from tests.live.slurm import remote
from tests.live.slurm.conftest import agents_of, connected
from tests.live.waiting import wait_for

PREEMPTED = "Slurm preempted it for a job of higher priority (PREEMPTED)"
CANCELLED = "somebody cancelled it (scancel) (CANCELLED)"
ENDING = "Slurm is ending it (COMPLETING)"  # where its processes take longer than a client waits for words
SCAVENGE = {"ISTHMUS_SLURM__PARTITION": "batch", "ISTHMUS_SLURM__ELASTIC_PARTITION": "scavenge"}


def jobs_seen(path):
    return path.read_text().split() if path.exists() else []


def evictions(site):
    """Why leases were taken back, in words."""
    with site.client() as client:
        leases = client.get("/v1/leases?ended=1").json()
    return [lease["end_detail"] for lease in leases if lease["end_reason"] == "evicted"]


def test_an_urgent_batch_job_takes_an_elastic_lease_and_its_call_runs_again_uncharged(
    cluster, open_site, batch_job, tmp_path
):
    marks = tmp_path / "marks"
    with open_site(**SCAVENGE) as site, connected(site) as isthmus_site:
        future = isthmus_site.submit(remote.slow_at_first, 7, str(marks))
        wait_for(lambda: jobs_seen(marks))
        node = cluster.run("squeue", "-h", "-j", jobs_seen(marks)[0], "-o", "%N").strip()
        batch_job("sleep 60", "-p", "urgent", "-w", node, "--exclusive", "-N1")
        assert future.result(timeout_s=30) == 49
        assert len(jobs_seen(marks)) == 2
        assert evictions(site) == [f"Slurm job {jobs_seen(marks)[0]}: {PREEMPTED}"]


def test_a_reserved_lease_is_drawn_from_the_partition_that_nobody_preempts(cluster, open_site):
    with open_site(**SCAVENGE) as site, connected(site) as isthmus_site:
        reserved = isthmus_site.call(remote.where_reserved)["job"]
        elastic = isthmus_site.call(remote.where)["job"]
        partitions = cluster.run("squeue", "-h", "-j", f"{reserved},{elastic}", "-o", "%A %P").split()
        assert dict(zip(partitions[::2], partitions[1::2], strict=True)) == {
            reserved: "batch",
            elastic: "scavenge",
        }


def test_an_outsiders_scancel_evicts_with_slurms_reason_and_the_call_runs_again(cluster, open_site, tmp_path):
    marks = tmp_path / "marks"
    with open_site() as site, connected(site) as isthmus_site:
        future = isthmus_site.submit(remote.slow_at_first, 5, str(marks))
        wait_for(lambda: jobs_seen(marks))
        cluster.run("scancel", jobs_seen(marks)[0])
        assert future.result(timeout_s=30) == 25
        assert len(jobs_seen(marks)) == 2
        (words,) = evictions(site)
        assert words.removeprefix(f"Slurm job {jobs_seen(marks)[0]}: ") in (CANCELLED, ENDING)


def test_a_lease_is_handed_over_before_its_walltime_ends(open_site, tmp_path):
    """Its call is running at that moment, and runs again in another job."""
    marks = tmp_path / "marks"
    limits = {"ISTHMUS_SLURM__TIME_LIMIT_S": "60", "ISTHMUS_SLURM__CLOSE_S": "52"}
    with open_site(**limits) as site, connected(site) as isthmus_site:
        assert isthmus_site.submit(remote.slow_at_first, 6, str(marks)).result(timeout_s=60) == 36
        assert len(set(jobs_seen(marks))) == 2
        assert "the time limit of its allocation is near" in evictions(site)


def test_a_call_begins_in_no_job_that_ends_before_it_may(open_site, tmp_path):
    """Its client knows from the first one how long the function takes."""
    first, second = tmp_path / "first", tmp_path / "second"
    limits = {"ISTHMUS_SLURM__TIME_LIMIT_S": "60", "ISTHMUS_SLURM__CLOSE_S": "48"}
    with open_site(**limits) as site, connected(site) as isthmus_site:
        began_s = time.monotonic()
        assert isthmus_site.call(remote.slow_square, 6, str(first), 5.0) == 36
        time.sleep(
            max(began_s + 10.5 - time.monotonic(), 0.0)
        )  # the job has two seconds left, and two of grace
        assert isthmus_site.call(remote.slow_square, 7, str(second), 5.0) == 49
        assert len(jobs_seen(second)) == 1, "it was not begun twice"


def test_a_dead_slurmctld_changes_nothing_for_open_leases(cluster, open_site):
    soon = {"ISTHMUS_SLURM__COMMAND_TIMEOUT_S": "2", "ISTHMUS_SLURM__PENDING_S": "1"}
    with open_site(**soon) as site, connected(site) as isthmus_site:
        job = isthmus_site.call(remote.where)["job"]
        cluster.wait_until_saved(int(job))
        with cluster.without_controller():
            time.sleep(2.0)  # several ticks in which Slurm cannot be read
            assert isthmus_site.call(remote.where)["job"] == job
            with site.client() as client:
                (lease,) = client.get("/v1/leases").json()
                assert lease["state"] == "active"
                refused = client.post("/v1/leases", json={"lease_class": "reserved"}).json()["error"]
            assert refused["code"] in ("SiteUnavailableError", "NoCapacityError")

        def is_back():
            assert isthmus_site.call(remote.where)["job"] == job  # in use: an idle lease would be given back
            return int(job) in cluster.jobs()

        wait_for(is_back)
        time.sleep(1.5)  # several ticks in which it can
        assert isthmus_site.call(remote.where)["job"] == job


def test_a_killed_site_finds_its_jobs_again_and_submits_nothing_twice(cluster, open_site, tmp_path):
    with open_site() as first, connected(first) as isthmus_site:
        job = isthmus_site.call(remote.where)["job"]
        agents = agents_of(tmp_path)
        assert first.stop(signal.SIGKILL) == -signal.SIGKILL
        assert isthmus_site.call(remote.where)["job"] == job
        with open_site() as second:
            assert second.url == first.url

            def is_adopted():
                with second.client() as client:
                    nodes = client.get("/v1/leases").json()
                return [lease["state"] for lease in nodes] == ["active"] and agents_of(tmp_path) == agents

            wait_for(is_adopted)
            time.sleep(1.5)  # several ticks
            assert is_adopted()
            assert cluster.our_jobs() == [int(job)]
            assert isthmus_site.call(remote.where)["job"] == job


def test_a_job_that_no_lease_claims_is_cancelled_when_the_site_comes_back(cluster, open_site):
    with open_site() as first, first.client() as client:
        reply = client.post("/v1/leases", json={})
        assert reply.status_code == 201, reply.text
        grant = reply.json()["grants"][0]
        first.stop(signal.SIGKILL)
        for file in first.state.glob("ledger.sqlite3*"):
            file.unlink()
        assert len(cluster.our_jobs()) == 1
        with open_site():
            wait_for(lambda: not cluster.our_jobs())
    wait_for(lambda: not os.path.exists(f"/proc/{grant['executors'][0]['pid']}"))


def test_a_suspended_job_keeps_its_lease(cluster, open_site):
    with open_site() as site, connected(site) as isthmus_site:
        job = isthmus_site.call(remote.where)["job"]
        cluster.run("scontrol", "suspend", job)
        time.sleep(1.5)
        with site.client() as client:
            assert [lease["state"] for lease in client.get("/v1/leases").json()] == ["active"]
        cluster.run("scontrol", "resume", job)
        assert isthmus_site.call(remote.where)["job"] == job


@pytest.fixture
def spoil(cluster, tmp_path):
    """Puts a wrapper of a tool first on PATH, which does something else while the file `broken` is there."""

    def spoilt(tool, instead):
        real = cluster.run("which", tool).strip()
        (tmp_path / "bin").mkdir()
        wrapper = tmp_path / "bin" / tool
        wrapper.write_text(
            f'#!/bin/sh\n[ -e {tmp_path}/broken ] && {{ {instead}; exit 0; }}\nexec {real} "$@"\n'
        )
        wrapper.chmod(0o755)
        return f"{tmp_path}/bin:{os.environ['PATH']}"

    return spoilt


@pytest.mark.parametrize("tool", ["squeue", "sinfo"])
def test_garbled_output_changes_nothing(open_site, tmp_path, spoil, tool):
    with open_site(PATH=spoil(tool, 'printf "1|n1|RUN"')) as site, connected(site) as isthmus_site:
        job = isthmus_site.call(remote.where)["job"]
        (tmp_path / "broken").touch()
        time.sleep(1.5)  # several ticks
        assert isthmus_site.call(remote.where)["job"] == job
        (tmp_path / "broken").unlink()
        time.sleep(1.0)
        assert isthmus_site.call(remote.where)["job"] == job


def test_while_slurm_is_slow_leases_are_given_and_ended(open_site, tmp_path, spoil):
    """A squeue that takes longer than the test: no survey ends, and everything else goes on."""
    patient = {"ISTHMUS_SLURM__COMMAND_TIMEOUT_S": "60", "PATH": spoil("squeue", "exec sleep 50")}
    with open_site(**patient) as site, connected(site) as isthmus_site:
        job = isthmus_site.call(remote.where)["job"]
        (tmp_path / "broken").touch()
        wait_for(lambda: site.is_running(b"sleep"))
        with site.client() as client:
            reply = client.post("/v1/leases", json={"resources": {"cores": 1, "memory": "64MiB"}})
            assert reply.status_code == 201, reply.text
            (grant,) = reply.json()["grants"]
            assert client.delete(f"/v1/leases/{grant['lease']}").status_code == 200
        assert isthmus_site.call(remote.where)["job"] == job
        assert site.is_running(b"sleep")
        (tmp_path / "broken").unlink()
