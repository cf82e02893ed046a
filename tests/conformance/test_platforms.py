"""What every platform promises, checked on each of them."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from isthmus.core.errors import NoCapacityError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import LeaseClass, Node, Resources
from isthmus.core.settings import LeasingSettings, NodeSettings, Settings
from isthmus.platforms import LocalPlatform, MemoryPlatform, Platform

ONE = Resources(cores=1, memory="1GiB")


@asynccontextmanager
async def memory(state: Path) -> AsyncIterator[Platform]:
    node = Node(
        node=NodeId("n"), platform="memory", cores=4, memory_bytes=8 * 2**30, amounts={"bandwidth": 10**9}
    )
    platform = MemoryPlatform((node,), licenses={"matlab": 3})
    await platform.start()
    yield platform
    await platform.close()


@asynccontextmanager
async def local(state: Path) -> AsyncIterator[Platform]:
    """Not started: that its agent lives and dies with it is tested in tests/unit/platforms."""
    settings = Settings(
        node=NodeSettings(cores=4, memory="8GiB", bandwidth="1Gbit/s"),
        leasing=LeasingSettings(licenses={"matlab": 3}),
    )
    platform = LocalPlatform(settings, state, "http://127.0.0.1:9", b"j" * 32)
    yield platform
    await platform.close()


Opener = Callable[[Path], AbstractAsyncContextManager[Platform]]
every_platform = pytest.mark.parametrize("opened", [memory, local], ids=lambda opener: opener.__name__)


def run(story: Callable[[Platform, Node], object], opened: Opener, state: Path) -> None:
    import asyncio

    async def tell() -> None:
        async with opened(state) as platform:
            await story(platform, (await platform.nodes())[0])  # type: ignore[misc]

    asyncio.run(tell())


@every_platform
def test_nodes_say_what_may_be_leased(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        assert (node.cores, node.memory_bytes, node.platform) == (4, 8 * 2**30, platform.name)

    run(story, opened, tmp_path)


@every_platform
def test_no_more_licences_are_given_than_the_site_has(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        two = Resources(cores=1, memory="1GiB", licenses={"matlab": 2})
        assert {kind: stock.total for kind, stock in (await platform.stocks()).items()} == {
            "licenses.matlab": 3
        }
        await platform.acquire(AllocationId("al_1"), node.node, two, LeaseClass.ELASTIC)
        with pytest.raises(NoCapacityError, match="2 of 3 'matlab' licences are held, and 2 are needed"):
            await platform.acquire(AllocationId("al_2"), node.node, two, LeaseClass.ELASTIC)
        await platform.release(AllocationId("al_1"))
        await platform.acquire(AllocationId("al_2"), node.node, two, LeaseClass.ELASTIC)

    run(story, opened, tmp_path)


@every_platform
def test_no_more_bandwidth_is_given_than_the_node_has(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        assert node.amounts == {"bandwidth": 10**9}
        most = Resources(cores=1, memory="1GiB", bandwidth="600Mbit/s")
        await platform.acquire(AllocationId("al_1"), node.node, most, LeaseClass.ELASTIC)
        with pytest.raises(NoCapacityError, match="600 Mbit/s of 1 Gbit/s of bandwidth are held"):
            await platform.acquire(AllocationId("al_2"), node.node, most, LeaseClass.ELASTIC)

    run(story, opened, tmp_path)


@every_platform
def test_acquiring_twice_under_one_id_takes_once(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        first = await platform.acquire(AllocationId("al_1"), node.node, ONE, LeaseClass.ELASTIC)
        again = await platform.acquire(AllocationId("al_1"), node.node, ONE, LeaseClass.ELASTIC)
        assert first == again
        assert (first.node, first.resources) == (node.node, ONE)
        assert await platform.allocations() == {"al_1": "running"}

    run(story, opened, tmp_path)


@every_platform
def test_a_node_gives_no_more_than_it_has(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        for number in range(4):
            await platform.acquire(AllocationId(f"al_{number}"), node.node, ONE, LeaseClass.ELASTIC)
        with pytest.raises(NoCapacityError, match="0 cores"):
            await platform.acquire(AllocationId("al_5"), node.node, ONE, LeaseClass.ELASTIC)
        await platform.release(AllocationId("al_0"))
        await platform.acquire(AllocationId("al_5"), node.node, ONE, LeaseClass.ELASTIC)
        with pytest.raises(NoCapacityError):
            await platform.acquire(
                AllocationId("al_6"), node.node, Resources(memory="64GiB"), LeaseClass.ELASTIC
            )

    run(story, opened, tmp_path)


@every_platform
def test_releasing_twice_and_what_was_never_there_changes_nothing(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        await platform.acquire(AllocationId("al_1"), node.node, ONE, LeaseClass.RESERVED)
        for name in ("al_1", "al_1", "al_unknown"):
            await platform.release(AllocationId(name))
        assert await platform.allocations() == {}

    run(story, opened, tmp_path)


@every_platform
def test_an_unknown_node_has_no_capacity(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        with pytest.raises(NoCapacityError, match="no node 'elsewhere'"):
            await platform.acquire(AllocationId("al_1"), NodeId("elsewhere"), ONE, LeaseClass.ELASTIC)

    run(story, opened, tmp_path)


@every_platform
def test_closing_twice_is_fine(opened: Opener, tmp_path: Path) -> None:
    async def story(platform: Platform, node: Node) -> None:
        await platform.close()
        await platform.close()
        assert await platform.allocations() == {}

    run(story, opened, tmp_path)
