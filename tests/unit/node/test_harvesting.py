"""What harvested leases and the site are told, round by round, of an owner that takes its memory back."""

import asyncio

from isthmus.core.ids import LeaseId
from isthmus.node.harvesting import Harvesting
from isthmus.node.owners import Use, lent_by
from isthmus.node.slack import CALM_NS, STALLED_MAX, Guest

GIB = 2**30
S = 10**9
MS = 10**6
LEASE = LeaseId("ls_a")
JOB = {
    "SLURM_JOB_ID": "42",
    "SLURM_CPUS_ON_NODE": "4",
    "SLURM_MEM_PER_NODE": "10240",
    "SLURMD_NODENAME": "n7",
}


class Round:
    """Stands for the host, the owner and the kernel's counter of stalls; `told`: the slack at each report."""

    def __init__(self) -> None:
        self.used_bytes = 0
        self.stalled = 0.0
        self.evicted: list[LeaseId] = []
        self.told: list[int] = []
        self.harvesting = Harvesting(lent_by(JOB, "auto", "auto"), self, 1.0, self._tell)
        self.harvesting._owner = self.harvesting._stalls = self

    def look(self, now_ns: int, guest_bytes: int) -> None:
        guests = [Guest(LEASE, 1, guest_bytes)]
        self.harvesting._measure(now_ns, guests)
        self.harvesting._keep_within_slack(guests, now_ns)

    def find(self) -> None:
        pass

    def sample(self, now_ns: int) -> Use:
        return Use(0.0, self.used_bytes)

    def share(self, now_ns: int) -> float:
        return self.stalled

    async def end(self, lease, reason, grace_s, detail):
        self.evicted.append(lease)

    def _tell(self) -> None:
        self.told.append(self.harvesting.slack.memory_bytes)


def run(look: Round, *steps: tuple[int, int, int, float]) -> None:
    """Each: when, bytes that the guest has and that the owner uses, share of the time stalled."""

    async def story() -> None:
        for now_ns, guest_bytes, look.used_bytes, look.stalled in steps:
            look.look(now_ns, guest_bytes)
            await asyncio.gather(*look.harvesting._evictions)

    asyncio.run(story())


def test_an_eviction_between_two_notes_tells_the_site_why_it_came() -> None:
    look = Round()
    run(look, (S, GIB, 0, 0.0), (S + 10 * MS, GIB, 10 * GIB, 0.0))
    assert look.evicted == [LEASE]
    assert look.told[-1] < GIB, "or the site would place it here again"


def test_after_a_shortage_nothing_new_comes_but_what_grows_a_little_stays() -> None:
    look = Round()
    run(look, (S, 4 * GIB, 0, 2 * STALLED_MAX), (S + 100 * MS, GIB, 0, 0.0))
    assert look.evicted == [LEASE], "half of it had to go"
    assert look.harvesting.slack.memory_bytes == GIB
    grown = [(S + number * 50 * MS, GIB + number * 4096, 0, 0.0) for number in range(3, 60)]
    run(look, *grown)
    assert look.evicted == [LEASE]
    assert look.harvesting.slack.memory_bytes == GIB, "what grew lifts it not"
    run(look, *((S + CALM_NS + number * 200 * MS, GIB, 0, 0.0) for number in range(1, 9)))
    assert look.harvesting.slack.memory_bytes == 9 * GIB
