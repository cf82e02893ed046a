"""What every way to speak to Slurm promises, on a real cluster: commands here, or by SSH, or slurmrestd."""

import asyncio
import os
import sys
import time

import msgspec
import pytest

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import LeaseClass, Resources
from isthmus.core.settings import RestSettings, SlurmPoolSettings, SlurmSettings, SshSettings
from isthmus.platforms.slurm import checks, open_client, reasons
from isthmus.platforms.slurm.client import RefusedError
from isthmus.platforms.slurm.records import (
    GONE,
    JobRequest,
    License,
    PoolRequest,
    Program,
    allocation_of,
    pool_of,
)
from tests.live.waiting import wait_for

PLACES = ["here", "ssh", "rest"]
every_place = pytest.mark.parametrize("place", PLACES)
SAY = "import os, signal, time; print(os.environ['SECRET'], os.environ['SLURMD_NODENAME'], flush=True); {}"


@pytest.fixture
def settings_of(cluster, request, tmp_path, monkeypatch):
    """Settings for speaking to the cluster from each place."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    plain = SlurmSettings(partition="batch", time_limit_s=600, command_timeout_s=5)

    def made(place):
        if place == "ssh":
            ssh = SshSettings(host="login", config=str(request.getfixturevalue("login_node").config))
            return msgspec.structs.replace(plain, ssh=ssh)
        if place == "rest":
            if not os.path.exists(cluster.rest_url.removeprefix("unix:")):
                pytest.skip("no slurmrestd here: apt-get install slurmrestd slurm-wlm-jwt-plugin")
            (tmp_path / "token").write_text(cluster.token())
            rest = RestSettings(url=cluster.rest_url, token_file=str(tmp_path / "token"))
            return msgspec.structs.replace(plain, rest=rest)
        return plain

    return made


def tell(settings, story):
    """Run a story with a client, which is closed at its end."""

    async def told():
        client = open_client(settings)
        try:
            await asyncio.wait_for(story(client), 60)
        finally:
            await client.close()

    asyncio.run(told())


def asked(tmp_path, node="n1", cores=1, then="time.sleep(60)"):
    words = (sys.executable, "-c", SAY.format(then))
    return JobRequest(
        site="5173", allocation=AllocationId(f"al_{os.path.basename(tmp_path)}"), node=NodeId(node),
        resources=Resources(cores=cores, memory="100MiB"), lease_class=LeaseClass.ELASTIC,
        program=Program(words=words, environ={"SECRET": "it's"}, log=str(tmp_path / "logs" / "program.log")),
    )  # fmt: skip


async def until_over(client, job):
    while (await client.state(job))[0] in reasons.HOLDING:
        await asyncio.sleep(0.1)


@every_place
def test_it_says_what_there_is(settings_of, place):
    async def story(client):
        nodes = {use.node: use for use in await client.nodes()}
        assert sorted(nodes) == [f"n{number}" for number in range(1, 7)]
        assert (nodes["n1"].cores, nodes["n1"].memory_bytes, nodes["n1"].features) == (
            4,
            8 << 30,
            ("virtual",),
        )
        assert nodes["n1"].state in reasons.USABLE_NODES
        assert await client.partitions() >= {"batch", "urgent", "scavenge"}
        assert " UP" in await client.ping()
        assert await client.state(999_999) == (GONE, "")

    tell(settings_of(place), story)


@every_place
def test_a_program_runs_in_a_job_that_is_ours_until_it_is_cancelled(settings_of, place, tmp_path):
    request = asked(tmp_path, "n2", cores=2)

    async def story(client):
        number = await client.take(request)
        step = await client.start(number, request)
        (job,) = [job for job in await client.jobs() if allocation_of(job, "5173") == request.allocation]
        assert (job.job, job.node, job.state, job.cores) == (number, "n2", "RUNNING", 2)
        assert job.memory_bytes == 100 << 20
        assert 300 < job.ends_s - time.time() <= 660
        (held,) = [use for use in await client.nodes() if use.node == "n2"]
        assert held.cores_held >= 2
        log = tmp_path / "logs" / "program.log"
        await asyncio.to_thread(wait_for, lambda: log.exists() and "it's n2" in log.read_text())
        await client.cancel(number)
        await step.wait()
        await until_over(client, number)
        assert reasons.allocation_state((await client.state(number))[0]) == "ended"
        await client.cancel_named(request.allocation)  # nothing is left to cancel: fine

    tell(settings_of(place), story)


@every_place
def test_licences_are_asked_for_and_told_from_every_place(settings_of, place, tmp_path):
    request = msgspec.structs.replace(asked(tmp_path, "n4"), licenses={"matlab": 2})

    async def story(client):
        assert await client.licenses() == (License(name="matlab", total=4, free=4),)
        number = await client.take(request)
        (job,) = [job for job in await client.jobs() if allocation_of(job, "5173") == request.allocation]
        assert job.licenses == {"matlab": 2}
        assert await client.licenses() == (License(name="matlab", total=4, free=2),)
        await client.cancel(number)
        await until_over(client, number)

    tell(settings_of(place), story)


@every_place
def test_a_job_that_stands_ready_says_whose_it_is_and_what_waits_is_told(
    settings_of, place, tmp_path, batch_job, cluster
):
    shape = SlurmPoolSettings(cores=1, memory="100MiB", partition="scavenge")
    script = f'echo "$SECRET $SLURMD_NODENAME" >{tmp_path}/said; exec sleep 60'
    request = PoolRequest(site="5173", pool="burst", shape=shape, script=script, environ={"SECRET": "it's"})

    async def story(client):
        number = await client.submit(request)
        said = tmp_path / "said"
        await asyncio.to_thread(wait_for, lambda: said.exists() and "it's n" in said.read_text())
        (job,) = [job for job in await client.jobs() if job.job == number]
        assert (pool_of(job, "5173"), job.state) == ("burst", "RUNNING")
        assert (job.cores, job.memory_bytes) == (1, 100 << 20)
        await client.cancel(number)
        await until_over(client, number)
        running = batch_job("sleep 60", "-N6", "--exclusive")
        await asyncio.to_thread(wait_for, lambda: running in cluster.jobs())
        waiting = batch_job("sleep 60", "-N5", "--exclusive")
        while [(one.job, one.reason) for one in await client.queue()] != [(waiting, "Resources")]:
            await asyncio.sleep(0.1)
        (found,) = await client.queue()
        assert (found.partition, found.nodes) == ("batch", 5)

    tell(settings_of(place), story)


@every_place
def test_a_job_that_waits_is_withdrawn_by_its_name(settings_of, place, tmp_path, batch_job, cluster):
    blocker = batch_job("sleep 60", "-w", "n3", "--exclusive")
    wait_for(lambda: blocker in cluster.jobs())
    request = asked(tmp_path, "n3")

    async def story(client):
        taking = asyncio.create_task(client.take(request))

        async def mine():
            jobs = [job for job in await client.jobs() if allocation_of(job, "5173") == request.allocation]
            return [job for job in jobs if reasons.allocation_state(job.state) == "pending"]

        while not (found := await mine()):
            await asyncio.sleep(0.1)
        assert reasons.why_pending(found[0].reason)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        await client.cancel_named(request.allocation)
        while await mine():
            await asyncio.sleep(0.1)

    tell(settings_of(place), story)


@every_place
def test_what_slurm_refuses_is_refused_with_its_words(settings_of, place, tmp_path):
    async def story(client):
        with pytest.raises(RefusedError, match=r"(?i)node"):
            await client.take(asked(tmp_path, "n99"))

    tell(settings_of(place), story)


@every_place
def test_the_doctor_finds_all_that_is_needed(settings_of, place):
    settings = settings_of(place)

    async def story(client):
        found = {check.subject: check for check in await checks.examine(settings, client)}
        assert [check.subject for check in found.values() if check.verdict == "bad"] == []
        assert " UP" in found["controller"].words
        assert client.place in found["controller"].words

    tell(settings, story)


def test_without_slurmctld_nothing_counts_as_gone(settings_of, cluster, tmp_path):
    """All places at once: each start of slurmctld takes seconds."""
    places = [msgspec.structs.replace(settings_of(place), command_timeout_s=3.0) for place in PLACES]

    async def hear(client):
        asks = client.jobs(), client.nodes(), client.state(1), client.cancel(1)
        for error in await asyncio.gather(*asks, return_exceptions=True):
            assert isinstance(error, SiteUnavailableError), error
            assert not isinstance(error, RefusedError), error

    async def everywhere(story):
        clients = [open_client(settings) for settings in places]
        try:
            await asyncio.wait_for(asyncio.gather(*map(story, clients)), 60)
        finally:
            await asyncio.gather(*(client.close() for client in clients))

    with cluster.without_controller():
        asyncio.run(everywhere(hear))
    asyncio.run(everywhere(lambda client: client.jobs()))
