"""Licences that Slurm counts: leased through it, so that batch jobs and leases honour each other's."""

from tests.live.waiting import wait_for

MATLAB = {"cores": 1, "memory": "100MiB", "licenses": {"matlab": 3}}


def test_slurm_itself_honours_what_a_lease_holds_and_leases_honour_batch_jobs(cluster, open_site, batch_job):
    with open_site() as site, site.client() as client:
        wait_for(lambda: client.get("/v1/licenses").json())
        reply = client.post("/v1/leases", json={"resources": MATLAB, "wait_s": 20})
        assert reply.status_code == 201, reply.text
        (grant,) = reply.json()["grants"]
        assert grant["enforcement"]["amounts"] == {"licenses.matlab": "slurm"}
        assert "Used=3" in cluster.run("scontrol", "show", "licenses")
        waiting = batch_job("sleep 60", "-L", "matlab:2")
        wait_for(lambda: "Licenses" in cluster.run("squeue", "-h", "-j", str(waiting), "-o", "%r"))
        error = client.post("/v1/leases", json={"resources": MATLAB}).json()["error"]
        assert error["code"] == "NoCapacityError"
        assert "3 of 4 'matlab' licences are held" in error["message"]
        client.delete(f"/v1/leases/{grant['lease']}")
        wait_for(lambda: waiting in cluster.jobs())
        wait_for(
            lambda: [(row["held"], row["others"]) for row in client.get("/v1/licenses").json()] == [(0, 2)]
        )
        error = client.post("/v1/leases", json={"resources": MATLAB}).json()["error"]
        assert "2 of 4 'matlab' licences are held (2 of them outside this site)" in error["message"]


def test_a_site_that_comes_back_knows_the_licences_of_its_jobs(cluster, open_site):
    with open_site() as site, site.client() as client:
        wait_for(lambda: client.get("/v1/licenses").json())
        assert client.post("/v1/leases", json={"resources": MATLAB, "wait_s": 20}).status_code == 201
        site.process.kill()
        site.process.wait()
    with open_site() as site, site.client() as client:
        wait_for(
            lambda: [(row["held"], row["others"]) for row in client.get("/v1/licenses").json()] == [(3, 0)]
        )


def test_a_site_may_be_held_to_fewer_and_count_its_own(cluster, open_site):
    names = {"ISTHMUS_LEASING__LICENSES__MATLAB": "1", "ISTHMUS_LEASING__LICENSES__ANSYS": "2"}
    with open_site(**names) as site, site.client() as client:
        wait_for(lambda: client.get("/v1/licenses").json())
        rows = client.get("/v1/licenses").json()
        assert [(row["name"], row["total"], row["free"]) for row in rows] == [
            ("ansys", 2, 2),
            ("matlab", 1, 1),
        ]
        error = client.post("/v1/leases", json={"resources": MATLAB}).json()["error"]
        assert "the site has 1 'matlab' licences, and 3 are asked for" in error["message"]
        ansys = {"resources": {"licenses": {"ansys": 1}, "memory": "100MiB"}, "wait_s": 20}
        (grant,) = client.post("/v1/leases", json=ansys).json()["grants"]
        assert grant["enforcement"]["amounts"] == {"licenses.ansys": "accounted-only"}
        client.delete(f"/v1/leases/{grant['lease']}")
