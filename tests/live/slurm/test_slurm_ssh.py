"""A login node reached by SSH: who it is, what a cut means, and agents that dial home through it."""

import asyncio
import sys

import pytest

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.settings import SshSettings
from isthmus.platforms.slurm.ssh import RunningBySsh
from tests.live.slurm import remote
from tests.live.slurm.conftest import connected
from tests.live.waiting import free_ports, wait_for


def tell(node, story, host="login"):
    async def told():
        running = RunningBySsh(SshSettings(host=host, config=str(node.config)))
        try:
            await asyncio.wait_for(story(running), 60)
        finally:
            await running.close()

    asyncio.run(told())


def test_commands_run_there_without_options_from_elsewhere(login_node):
    async def story(running):
        words = await running.run(
            ("sh", "-c", "echo $SLURM_TIME_FORMAT '$1' \"it's\"; squeue -h -j 1 | wc -l"), 10
        )
        assert words.printed.startswith("%s $1 it's")

    tell(login_node, story)


def test_a_jump_host_of_the_users_configuration_is_used(login_node):
    async def story(running):
        assert (await running.run(("echo", "through"), 10)).printed == "through\n"
        assert login_node.log().count("Accepted publickey") == 2

    tell(login_node, story, "inner")


def test_a_login_node_with_another_host_key_is_refused(login_node):
    login_node.trust((login_node.directory / "user.pub").read_text())

    async def story(running):
        with pytest.raises(SiteUnavailableError, match="host key of login is not known or has changed"):
            await running.run(("true",), 10)

    tell(login_node, story)


def test_a_login_node_that_does_not_take_our_key_says_so(login_node):
    (login_node.directory / "authorized_keys").write_text("")

    async def story(running):
        with pytest.raises(SiteUnavailableError, match="login refuses our SSH keys"):
            await running.run(("true",), 10)

    tell(login_node, story)


def test_after_a_cut_what_ran_is_not_known_and_the_next_command_connects_again(login_node, tmp_path):
    beat = tmp_path / "beat"
    program = (
        sys.executable,
        "-c",
        f"import time\nwhile 1: open({str(beat)!r}, 'a').write('.'); time.sleep(.05)",
    )

    async def story(running):
        step = await running.start(program, str(tmp_path / "log"), {})
        await asyncio.to_thread(wait_for, beat.exists)
        command = asyncio.create_task(running.run(("sleep", "60"), 30))
        await asyncio.to_thread(wait_for, lambda: login_node.has_child(b"sleep"))
        await asyncio.to_thread(login_node.cut)
        with pytest.raises(SiteUnavailableError, match=r"not known|was cut"):
            await command
        with pytest.raises(SiteUnavailableError, match="nobody tells"):
            await step.wait()
        assert (await running.run(("echo", "again"), 10)).printed == "again\n"
        size = beat.stat().st_size
        await asyncio.to_thread(wait_for, lambda: beat.stat().st_size > size)  # it goes on without us
        await running.run(("pkill", "-f", str(beat)), 10)

    tell(login_node, story)


def test_a_step_tells_its_end(login_node, tmp_path):
    async def story(running):
        steps = [
            await running.start(("sh", "-c", f"exit {code}"), str(tmp_path / "log"), {}) for code in (0, 3)
        ]
        assert [await step.wait() for step in steps] == [0, 3]

    tell(login_node, story)


def test_steps_that_start_at_once_share_one_session(login_node, tmp_path):
    """sshd allows a connection ten."""

    async def story(running):
        starts = (running.start(("true",), str(tmp_path / "log"), {}) for _ in range(8))
        for step in await asyncio.gather(*starts):
            assert await step.wait() == 0
        await asyncio.to_thread(wait_for, lambda: login_node.count_children(b"sh") == 1)

    tell(login_node, story)


def test_leases_are_drawn_through_a_login_node_and_survive_a_cut(login_node, open_site, cluster, tmp_path):
    ssh = {
        "ISTHMUS_SLURM__SSH__HOST": "login",
        "ISTHMUS_SLURM__SSH__CONFIG": str(login_node.config),
        "ISTHMUS_SLURM__SSH__TUNNEL": f"127.0.0.1:{free_ports(1)}",
        "ISTHMUS_SLURM__AGENT_DIR": str(tmp_path / "there"),
        "SLURM_CONF": "/nowhere",  # the site's machine knows nothing of Slurm
    }
    with open_site(**ssh) as site, connected(site) as isthmus_site:
        job = isthmus_site.call(remote.where)["job"]
        login_node.cut()
        assert isthmus_site.call(remote.where)["job"] == job

        def is_back():
            assert isthmus_site.call(remote.where)["job"] == job
            with site.client() as client:
                (lease,) = client.get("/v1/leases").json()
            return lease["state"] == "active" and login_node.log().count("Accepted publickey") == 2

        wait_for(is_back)
        assert cluster.our_jobs() == [int(job)]
    wait_for(lambda: not list((tmp_path / "there").glob("al_*")))
