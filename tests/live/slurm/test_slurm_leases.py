"""Leases from a real Slurm: drawn, used, given back, and refused with words."""

import pytest

from isthmus.core.errors import DeniedError
from tests.live.slurm import remote
from tests.live.slurm.conftest import connected
from tests.live.waiting import wait_for


def test_a_function_runs_in_a_job_of_its_own_which_ends_with_the_lease(cluster, open_site):
    with open_site() as site, connected(site) as isthmus_site:
        ran = isthmus_site.call(remote.where)
        assert ran["node"] in {f"n{number}" for number in range(1, 7)}
        assert [int(ran["job"])] == cluster.our_jobs()
        with site.client() as client:
            lease = client.get("/v1/leases").json()[0]
        assert (lease["node"], lease["agent"]) == (ran["node"], lease["allocation"])
        isthmus_site.close()
        wait_for(lambda: not cluster.our_jobs())
        assert site.process.poll() is None


def test_a_map_uses_several_nodes_beside_batch_jobs_that_it_leaves_alone(cluster, open_site, batch_job):
    jobs = [batch_job("sleep 60", "-w", f"n{number}", "-c2") for number in (1, 2, 3)]
    wait_for(lambda: set(jobs) <= set(cluster.jobs()))
    with open_site() as site, connected(site) as isthmus_site:
        request = {"resources": {"cores": 2, "memory": "256MiB"}, "count": 6}
        with site.client() as client:
            reply = client.post("/v1/leases", json=request)
            assert reply.status_code == 201, reply.text
            grants = reply.json()["grants"]
            assert len({grant["node"] for grant in grants}) >= 2
            for grant in grants:
                client.delete(f"/v1/leases/{grant['lease']}")
        assert list(isthmus_site.map(remote.square, range(100))) == [number**2 for number in range(100)]
        assert set(jobs) <= set(cluster.jobs())


def test_what_batch_jobs_hold_is_not_free_and_a_request_waits_with_words(cluster, open_site, batch_job):
    batch_job("sleep 60", "-N6", "--exclusive")
    with open_site() as site, site.client() as client:
        wait_for(lambda: all(node["other_cores"] == 4 for node in client.get("/v1/nodes").json()))
        answer = client.post("/v1/leases", json={})
        error = answer.json()["error"]
        assert error["code"] == "NoCapacityError"
        assert "most free cores on one node: 0" in error["message"]


def test_more_than_there_is_is_denied_with_what_would_fit(open_site):
    with open_site() as site, connected(site) as isthmus_site:
        with pytest.raises(DeniedError, match=r"no node has 64 cores \(most: 4 on n1"):
            isthmus_site.call(remote.too_wide)


def test_two_sites_on_one_cluster_keep_to_their_own_jobs(cluster, open_site, tmp_path):
    with open_site() as first, open_site(tmp_path / "state" / "second") as second:
        with connected(first) as one, connected(second) as two:
            assert one.call(remote.where)["job"] != two.call(remote.where)["job"]
            assert second.stop() == 0
            assert len(cluster.our_jobs()) == 1
            assert one.call(remote.square, 3) == 9
