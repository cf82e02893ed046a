"""Sites that draw leases by slurmrestd alone: no command of Slurm works where they run."""

import os
import signal

import pytest

from tests.live.slurm import remote
from tests.live.slurm.conftest import connected
from tests.live.slurm.test_slurm_pools import pool, pool_jobs, ready
from tests.live.waiting import wait_for


@pytest.fixture
def by_rest(cluster, tmp_path):
    """Settings of such a site; its token is in the file `token`."""
    if not os.path.exists(cluster.rest_url.removeprefix("unix:")):
        pytest.skip("no slurmrestd here: apt-get install slurmrestd slurm-wlm-jwt-plugin")
    (tmp_path / "token").write_text(cluster.token())
    return {
        "ISTHMUS_SLURM__REST__URL": cluster.rest_url,
        "ISTHMUS_SLURM__REST__TOKEN_FILE": str(tmp_path / "token"),
        "ISTHMUS_SLURM__PARTITION": "batch",
        "SLURM_CONF": "/nowhere",
    }


def test_a_lease_is_a_batch_job_and_its_call_moves_on_when_somebody_cancels_it(
    cluster, open_site, by_rest, tmp_path
):
    marks = tmp_path / "marks"
    with open_site(**by_rest) as site, connected(site) as isthmus_site:
        future = isthmus_site.submit(remote.slow_at_first, 5, str(marks))
        wait_for(lambda: marks.exists() and marks.read_text().split())
        (job,) = marks.read_text().split()
        assert cluster.our_jobs() == [int(job)]
        cluster.run("scancel", job)
        assert future.result(timeout_s=30) == 25
        assert len(marks.read_text().split()) == 2
        isthmus_site.close()
        wait_for(lambda: not cluster.our_jobs())


def test_a_pool_stands_ready_by_slurmrestd_too(cluster, open_site, by_rest):
    with open_site(**by_rest, **pool()) as site, connected(site) as isthmus_site:
        wait_for(lambda: ready(site))
        (job,) = pool_jobs(cluster)
        assert isthmus_site.call(remote.where)["job"] == str(job)
        assert cluster.our_jobs() == [job]


def test_an_expired_token_is_said_in_words_and_a_new_one_is_taken(cluster, open_site, by_rest, tmp_path):
    with open_site(**by_rest) as site, connected(site) as isthmus_site:
        job = isthmus_site.call(remote.where)["job"]
        site.stop(signal.SIGKILL)
        (tmp_path / "token").write_text(cluster.token(life_s=1))
        wait_for(lambda: cluster.is_expired((tmp_path / "token").read_text()))
        with open_site(**by_rest) as second:
            with second.client() as client:
                error = client.post("/v1/leases", json={"wait_s": 0}).json()["error"]
            assert "expired at" in (second.state / "logs" / "site.log").read_text()
            assert error["code"] in ("NoCapacityError", "SiteUnavailableError"), error
            assert isthmus_site.call(remote.where)["job"] == job  # what is open goes on
            (tmp_path / "token").write_text(cluster.token())

            def is_found_again():
                assert isthmus_site.call(remote.where)["job"] == job
                with second.client() as client:
                    nodes = client.get("/v1/nodes").json()
                return sum(node["cores"] for node in nodes) == 24

            wait_for(is_found_again)
            assert cluster.our_jobs() == [int(job)]
