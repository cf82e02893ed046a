"""The local platform keeps one agent alive, and leaves none behind. No site listens: the agent keeps
dialling.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from isthmus.core.settings import NodeSettings, Settings
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


async def _abandon(platform: LocalPlatform) -> None:
    """As if the site had been killed: its agent goes on."""
    supervising = platform._supervising
    assert supervising is not None
    platform._stop = _spare  # type: ignore[method-assign]
    supervising.cancel()
    await asyncio.wait([supervising])


async def _spare(pid: int, gone: Coroutine[object, object, object]) -> None:
    gone.close()


@pytest.mark.parametrize("url", [NOBODY, "http://127.0.0.1:19"], ids=["the same address", "another address"])
def test_the_next_site_takes_over_the_agent_or_replaces_it(tmp_path: Path, url: str) -> None:
    async def story() -> None:
        killed = _platform(tmp_path)
        await killed.start()
        first = await _agent(killed)
        await _abandon(killed)
        successor = _platform(tmp_path, url)
        await successor.start()
        second = await _agent(successor)
        assert (second == first) == (url == NOBODY)
        await successor.close()
        assert _is_gone(first)
        assert _is_gone(second)

    _run(story)


def test_a_stale_agent_file_misleads_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        stale = AgentFile(pid=os.getpid(), started=1, url="ws://127.0.0.1:9/agent")
        (tmp_path / "agent.json").write_bytes(msgspec.json.encode(stale))
        platform = _platform(tmp_path)
        await platform.start()
        assert await _agent(platform) != os.getpid()
        await platform.close()

    _run(story)
