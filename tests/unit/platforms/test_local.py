"""The local platform keeps one agent alive, and leaves none behind. No site listens: the agent keeps
dialling.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.core.settings import NodeSettings, Settings
from isthmus.node.isolation import state_tag
from isthmus.platforms import LocalPlatform
from isthmus.platforms.local import AgentFile

SETTINGS = Settings(node=NodeSettings(cores=1, memory="1GiB", isolation="none"))
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused
WAIT_S = 20.0


def _platform(state: Path, url: str = NOBODY) -> LocalPlatform:
    return LocalPlatform(SETTINGS, state, url, b"j" * 32)


def _run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await story()

    asyncio.run(bounded())


async def _agent(platform: LocalPlatform, other_than: int = 0) -> int:
    """The process id of the agent, once there is one (again)."""
    while platform.agent_pid in (0, other_than):
        await asyncio.sleep(0.01)
    return platform.agent_pid


def _is_gone(pid: int) -> bool:
    """Not even a zombie is left."""
    return not Path(f"/proc/{pid}").exists()


def test_the_agent_dies_with_its_platform_and_leaves_no_zombie(tmp_path: Path) -> None:
    async def story() -> None:
        platform = _platform(tmp_path)
        await platform.start()
        await platform.start()
        pid = await _agent(platform)
        assert os.getpgid(pid) == pid, "its own group"
        await platform.close()
        assert _is_gone(pid)
        assert not (tmp_path / "agent.json").exists()

    _run(story)


def test_what_an_agent_left_that_was_just_killed_is_cleared_away(tmp_path: Path) -> None:
    async def story() -> None:
        platform = _platform(tmp_path)
        await platform.start()
        shared = Path(f"/dev/shm/isthmus-{os.getuid()}-{state_tag(tmp_path)}")
        pid = await _agent(platform)
        while not shared.exists():
            await asyncio.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        await platform.close()  # before anybody has noticed
        assert not shared.exists()

    _run(story)


def test_an_agent_that_dies_is_replaced(tmp_path: Path) -> None:
    async def story() -> None:
        platform = _platform(tmp_path)
        await platform.start()
        first = await _agent(platform)
        os.kill(first, signal.SIGKILL)
        second = await _agent(platform, other_than=first)
        assert _is_gone(first)
        await platform.close()
        assert _is_gone(second)

    _run(story)


def test_secrets_are_not_on_the_command_line(tmp_path: Path) -> None:
    async def story() -> None:
        platform = _platform(tmp_path)
        await platform.start()
        pid = await _agent(platform)
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        await platform.close()
        assert (b"j" * 32).hex().encode() not in command
        assert b"ws://127.0.0.1:9/agent" in command

    _run(story)


KILLED_SITE = """
import asyncio, sys
from pathlib import Path
from tests.unit.platforms.test_local import NOBODY, _agent, _platform

async def main():
    platform = _platform(Path(sys.argv[1]))
    await platform.start()
    print(await _agent(platform), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def _agent_of_a_killed_site(state: Path) -> int:
    """A site in a process of its own starts an agent and is killed; the agent goes on."""
    site = subprocess.Popen(
        [sys.executable, "-c", KILLED_SITE, str(state)], stdout=subprocess.PIPE, text=True
    )
    assert site.stdout is not None
    with site.stdout as lines:
        pid = int(lines.readline())
        site.kill()
    site.wait()
    return pid


@pytest.mark.parametrize("url", [NOBODY, "http://127.0.0.1:19"], ids=["the same address", "another address"])
def test_the_next_site_takes_over_the_agent_or_replaces_it(tmp_path: Path, url: str) -> None:
    first = _agent_of_a_killed_site(tmp_path)
    assert not _has_ended(first)

    async def story() -> None:
        successor = _platform(tmp_path, url)
        await successor.start()
        second = await _agent(successor)
        assert (second == first) == (url == NOBODY)
        await successor.close()
        assert _has_ended(first)
        assert _has_ended(second)

    _run(story)


def _has_ended(pid: int) -> bool:
    """Gone, or a zombie that this machine's first process has yet to reap: it is no child of ours."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_stale_agent_file_misleads_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        stale = AgentFile(pid=os.getpid(), started=1, url="ws://127.0.0.1:9/agent")
        (tmp_path / "agent.json").write_bytes(msgspec.json.encode(stale))
        platform = _platform(tmp_path)
        await platform.start()
        assert await _agent(platform) != os.getpid()
        await platform.close()

    _run(story)
