"""What every platform promises, on a real Slurm; without agents, whose start is tested with whole sites."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from isthmus.core.settings import Settings, SlurmSettings
from isthmus.platforms import SlurmPlatform
from isthmus.platforms.slurm import open_client
from tests.conformance import test_platforms as promises

PROMISES = [
    promises.test_nodes_say_what_may_be_leased,
    promises.test_acquiring_twice_under_one_id_takes_once,
    promises.test_a_node_gives_no_more_than_it_has,
    promises.test_releasing_twice_and_what_was_never_there_changes_nothing,
    promises.test_an_unknown_node_has_no_capacity,
    promises.test_closing_twice_is_fine,
]


async def nobody_waits(agent):
    """Stands for the site, which would wait until the agent has dialled in."""
    await asyncio.sleep(0)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__.removeprefix("test_"))
def test_slurm_keeps_the_promise_that(promise, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    settings = Settings(
        slurm=SlurmSettings(partition="batch", pending_s=1.5, tick_s=0.2, command_timeout_s=60)
    )

    @asynccontextmanager
    async def slurm(state):
        client = open_client(settings.slurm)
        site = "http://127.0.0.1:9", tmp_path.name.encode()
        platform = SlurmPlatform(settings, state, *site, nobody_waits, nobody_waits, client)
        await platform.start()
        yield platform
        await platform.close()

    promise(slurm, tmp_path)
    assert not cluster.our_jobs()
