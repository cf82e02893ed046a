"""The loop of pools, with others that act while it waits for Slurm."""

import asyncio
import time

import pytest

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import LeaseClass, Resources
from isthmus.core.settings import NodeSettings, SlurmPoolSettings, SlurmSettings
from isthmus.platforms.slurm.pool_agents import PoolAgents
from isthmus.platforms.slurm.pools import Pools
from isthmus.platforms.slurm.records import Job, Waiting
from isthmus.platforms.slurm.watching import Reading, Watch

POOL = SlurmPoolSettings(cores=4, memory="8GiB", minimum=2, maximum=4, contract="drain")
SMALL = Resources(cores=1)
AGENTS = PoolAgents(
    site="5173", url="ws://h:1/agent", directory="/s/agents", log="/s/srun.log", python="/py",
    join_key=b"secret", node_settings=NodeSettings(),
)  # fmt: skip


def job(number, state="PENDING", node="", comment="isthmus-pool:5173:burst"):
    return Job(
        job=number, node=NodeId(node), state=state, reason="Priority", cores=4, memory_bytes=2**33,
        ends_s=time.time() + 3600, comment=comment,
    )  # fmt: skip


class Slurm:
    """As much of it as pools ask for. `meanwhile` happens while the first job is being cancelled."""

    place = "a test"
    steps = None

    def __init__(self, *rows):
        self.rows = {row.job: row for row in rows}
        self.waits: list[Waiting] = []
        self.cancelled: list[int] = []
        self.faults: list[Exception] = []
        self.looks: list[int] = []
        self.meanwhile = None

    async def jobs(self):
        if self.faults:
            raise self.faults.pop()
        return tuple(self.rows.values())

    async def nodes(self):
        return ()

    async def licenses(self):
        return ()

    async def clock_s(self):
        return time.time()

    async def queue(self):
        return tuple(self.waits)

    async def state(self, number):
        self.looks.append(number)
        return (self.rows[number].state, "None") if number in self.rows else ("GONE", "")

    async def submit(self, request):
        number = 100 + len(self.rows)
        self.rows[number] = job(number)
        return number

    async def cancel(self, number):
        first, self.meanwhile = self.meanwhile, None
        if first is not None:
            await first(number)
        self.cancelled.append(number)
        self.rows.pop(number, None)

    async def remove(self, directory):
        pass


@pytest.fixture
def opened():
    """Pools whose agents dial in at once, on such books."""

    def open_pools(slurm):
        settings = SlurmSettings(pools={"burst": POOL}, tick_s=0.05)

        async def nothing(node):
            pass

        return Pools(settings, slurm, Watch(slurm, 0.05), nothing, nothing, AGENTS)

    return open_pools


def now(*rows):
    return Reading(tuple(rows), time.monotonic())


def claimant(number):
    return Waiting(job=number, partition="batch", reason="Priority", nodes=1, cores=4)


def test_a_job_that_others_lose_while_one_is_cancelled_is_passed_over(opened):
    slurm = Slurm(job(1), job(2), job(3))
    slurm.waits = [claimant(9)]
    pools = opened(slurm)

    async def lose_the_others(number):
        for other in {1, 2, 3} - {number}:
            del slurm.rows[other]
        await pools.see(now(slurm.rows[number]))

    slurm.meanwhile = lose_the_others
    asyncio.run(pools._step())
    assert len(slurm.cancelled) == 1


def test_a_job_that_begins_and_gets_a_lease_while_another_is_cancelled_stays(opened):
    slurm = Slurm(job(1), job(2))
    slurm.waits = [claimant(9)]
    pools = opened(slurm)

    async def start_the_other(number):
        (other,) = {1, 2} - {number}
        slurm.rows[other] = job(other, "RUNNING", "n1")
        await pools.see(now(*slurm.rows.values()))
        pools.acquire(AllocationId("al_1"), NodeId(f"n1.burst.{other}"), SMALL)

    slurm.meanwhile = start_the_other
    asyncio.run(pools._step())
    assert len(slurm.cancelled) == 1
    assert [one.leases for one in pools.report()] == [1]


def test_pools_go_on_after_a_fault_of_ours_and_tell_of_it(opened):
    slurm = Slurm()
    slurm.faults = [ZeroDivisionError("odd")]
    pools = opened(slurm)

    async def story():
        pools.start()
        while not any("odd" in word for word in pools.report()[0].words):
            await asyncio.sleep(0.01)
        while len(slurm.rows) < POOL.minimum:
            await asyncio.sleep(0.01)
        await pools.close()

    asyncio.run(story())


def test_an_older_reading_changes_nothing_after_a_newer_one(opened):
    async def story():
        pools = opened(Slurm())
        older = now(job(1, "RUNNING", "n1"))
        await pools.see(now(job(1)))
        await pools.see(older)
        return pools.nodes()

    assert asyncio.run(story()) == ()


def test_jobs_of_our_sites_that_wait_claim_nothing_whatever_else_waits(opened):
    slurm = Slurm(job(1), job(7, comment="isthmus:beef:al_2"), job(8, comment="isthmus is fine"))
    slurm.waits = [claimant(1), claimant(7)]
    pools = opened(slurm)
    asyncio.run(pools._step())
    assert slurm.cancelled == [], "the comment of a job of ours says whose it is"
    slurm.waits += [claimant(8)]
    asyncio.run(pools._step())
    assert 1 in slurm.cancelled


def test_who_had_no_room_is_not_forgotten_when_the_queue_cannot_be_read(opened):
    slurm = Slurm(job(1, "RUNNING", "n1"), job(2, "RUNNING", "n2"))
    pools = opened(slurm)

    async def silent():
        raise SiteUnavailableError("squeue did not answer")

    async def story():
        for allocation, node in (("al_1", "n1.burst.1"), ("al_2", "n2.burst.2")):
            await pools.see(now(*slurm.rows.values()))
            pools.acquire(AllocationId(allocation), NodeId(node), SMALL)
        pools.note_cold(SMALL, LeaseClass.ELASTIC)
        slurm.queue, answering = silent, slurm.queue
        with pytest.raises(SiteUnavailableError):
            await pools._step()
        slurm.queue = answering
        await pools._step()

    asyncio.run(story())
    assert len(slurm.rows) == 3


def test_what_ended_a_job_is_asked_once_for_all_of_its_leases(opened):
    slurm = Slurm(job(1, "RUNNING", "n1"))
    pools = opened(slurm)
    node, leases = NodeId("n1.burst.1"), [AllocationId(f"al_{number}") for number in range(4)]

    async def story():
        await pools.see(now(*slurm.rows.values()))
        for allocation in leases:
            pools.acquire(allocation, node, SMALL)
        slurm.rows[1] = job(1, "PREEMPTED")
        first = asyncio.create_task(pools.fate(leases[0], node))
        others = asyncio.gather(*(pools.fate(allocation, node) for allocation in leases[1:]))
        await asyncio.sleep(0)
        first.cancel()
        return [await others, await pools.fate(leases[0], node)]

    others, last = asyncio.run(story())
    assert {one.state for one in (*others, last)} == {"ended"}
    assert slurm.looks == [1, 1], "once for those who ask together, and anew for who asks later"
