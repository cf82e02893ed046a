"""Decide what harvested leases may do now, from what the owner leaves idle. Pure.

    what the owner uses -> slack -> which leases run, which freeze, which leave

A core counts as idle from IDLE_SHARE on: the kernel gives it back within microseconds whenever the owner
wants it (`idling.py`), so what is left of a core between the owner's own bursts is worth running on.
Invariant: leases that came first run first; nothing is both frozen and thawed; a lease that is told to leave
gets no other order. Not here: measuring (`owners.py`), acting (`harvesting.py`).
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from isthmus.core.ids import LeaseId

IDLE_SHARE = 0.2  # of a core; less would be noise of the measurement and of the system itself
MEMORY_MARGIN = 0.1  # of what the job holds: left to its next allocation
STALLED_MAX = 0.05  # of the time: who waits for memory that long is short of it
CALM_NS = 10 * 10**9  # after somebody waited, for so long nothing more is taken
NO_CEILING = 2**63 - 1


class Slack(NamedTuple):
    """What the owner does not use of what it lends. `memory_bytes` may be negative: it needs some back."""

    cores: int
    memory_bytes: int


class Guest(NamedTuple):
    """A harvested lease. `frozen_ns`: since when it is frozen, 0: it runs."""

    lease: LeaseId
    cores: int
    memory_bytes: int
    frozen_ns: int = 0


class Verdict(NamedTuple):
    freeze: tuple[LeaseId, ...] = ()
    thaw: tuple[LeaseId, ...] = ()
    evict: tuple[LeaseId, ...] = ()


def slack(lent_cores: int, lent_bytes: int, held_bytes: int, used_cores: float, used_bytes: int) -> Slack:
    """
    lent_*  what the job lends at most
    held_*  what it holds; its cores are all lent ones here
    used_*  what it uses itself
    """
    idle_cores = int(max(0.0, lent_cores - used_cores) + 1.0 - IDLE_SHARE)
    idle_bytes = int(held_bytes * (1.0 - MEMORY_MARGIN)) - used_bytes
    return Slack(min(idle_cores, lent_cores), min(idle_bytes, lent_bytes))


def judge(guests: Iterable[Guest], now: Slack, now_ns: int, patience_ns: int) -> Verdict:
    """What is to change.

    guests       the longest here first
    patience_ns  how long a lease may stay frozen
    """
    freeze: list[LeaseId] = []
    thaw: list[LeaseId] = []
    evict: list[LeaseId] = []
    cores, memory_bytes = now
    for guest in guests:
        fits = guest.cores <= cores
        is_late = not fits and guest.frozen_ns > 0 and now_ns - guest.frozen_ns >= patience_ns
        if is_late or guest.memory_bytes > memory_bytes:
            evict.append(guest.lease)
            continue
        memory_bytes -= guest.memory_bytes
        if fits:
            cores -= guest.cores
        if fits and guest.frozen_ns:
            thaw.append(guest.lease)
        elif not fits and not guest.frozen_ns:
            freeze.append(guest.lease)
    return Verdict(tuple(freeze), tuple(thaw), tuple(evict))


def memory_ceiling(harvested_bytes: int, stalled: float, calm_ns: int, before_bytes: int) -> int:
    """What may be harvested while the owner, or its node, is short of memory: half of what is, the rest at
    the next look if that was not enough; then never more, until it has been calm for long.

    stalled       share of the time lately in which somebody waited for memory
    calm_ns       for how long that was at most STALLED_MAX
    before_bytes  the ceiling so far
    """
    if stalled > STALLED_MAX:
        return harvested_bytes // 2
    return min(before_bytes, harvested_bytes) if calm_ns < CALM_NS else NO_CEILING


class Progress(NamedTuple):
    """What a running lease got since the last look. `wants`: it would run if it could."""

    lease: LeaseId
    wants: bool
    share: float


class Starving:
    """Tells when the owner has woken up: leases that want to run and get too little, LOOKS times in a row."""

    LOOKS = 2
    SHARE_FULL = 0.75  # of a core: who wants to run and gets less is not alone there
    SHARE_MAX = IDLE_SHARE  # of a core: what counts as idle is worth running on

    def __init__(self) -> None:
        self._looks: dict[LeaseId, int] = {}

    def look(self, progress: Collection[Progress]) -> list[LeaseId]:
        """Those that have starved long enough; each is told once."""
        looks = {
            lease: self._looks.get(lease, 0) + 1
            for lease, wants, share in progress
            if wants and share < self.SHARE_MAX
        }
        starved = [lease for lease, count in looks.items() if count >= self.LOOKS]
        self._looks = {lease: count for lease, count in looks.items() if lease not in starved}
        return starved
