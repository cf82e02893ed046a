"""Clients that share one core through a real site: who does not use it gives way to who waits."""

import threading
from collections.abc import Iterator

import pytest

import isthmus
from tests.live import sdk_functions as remote
from tests.live.sites import RunningSite, running_site
from tests.live.waiting import wait_for


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSite]:
    state = tmp_path_factory.mktemp("sharing") / "state"
    with running_site(state, ISTHMUS_NODE__CORES="1", ISTHMUS_NODE__METER_S="0.2") as running:
        yield running


@pytest.fixture
def clients(
    site: RunningSite, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[isthmus.Site, isthmus.Site]]:
    monkeypatch.setenv("ISTHMUS_CLIENT__API_KEY", site.key)
    with isthmus.connect(site.url) as first, isthmus.connect(site.url) as second:
        yield first, second


def ended(site: RunningSite) -> dict[str, str]:
    with site.client() as admin:
        rows = admin.get("/v1/leases", params={"ended": 1}).json()
    return {row["lease"]: row["end_detail"] for row in rows if row["state"] == "ended"}


def test_a_client_that_waits_gets_the_core_of_one_that_rests(site, clients):
    first, second = clients
    assert first.call(remote.square, 3) == 9
    (lease,) = first.leases()
    assert second.call(remote.square, 4) == 16
    assert ended(site)[lease.lease] == "taken back while nothing ran in it"
    assert first.call(remote.square, 5) == 25


def test_an_actor_keeps_its_core_while_it_lives(site, clients):
    first, second = clients
    with first.actor(remote.Counter, 10) as counter:
        (lease,) = first.leases()
        with site.client() as impatient:
            refused = impatient.post("/v1/leases", json={"wait_s": 3}).json()["error"]
        assert refused["code"] == "NoCapacityError"
        assert counter.add(1).result() == 11
        assert [held.lease for held in first.leases()] == [lease.lease]
    assert second.call(remote.square, 6) == 36


def test_a_client_that_ends_waits_for_nothing_any_more(site, monkeypatch):
    """What was granted to it while it ends would stay leased until it expires."""
    monkeypatch.setenv("ISTHMUS_CLIENT__API_KEY", site.key)
    with isthmus.connect(site.url) as holder, holder.actor(remote.Counter, 10), site.client() as admin:
        waiting = isthmus.connect(site.url)
        future = waiting.submit(remote.square, 3)
        wait_for(lambda: admin.get("/v1/status").json()["requests_waiting"] == 1)
        waiting.close()
        assert future.cancelled()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("isthmus.request")]
        wait_for(lambda: admin.get("/v1/status").json()["requests_waiting"] == 0)
