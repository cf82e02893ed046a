"""Decide what a pool of allocations needs: more, fewer, others in place of those whose time is nearly over.

    staying   those that take leases
    old       those near their time limit: they go when others have taken their place
    leaving   those that take no further lease; they are cancelled once they have none

Invariant: pure; a pool is never larger than its maximum, not counting those that are about to go. What batch
jobs claim goes before everything, the minimum included.
Not here: submitting and cancelling (`pools.py`).
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from isthmus.core.model import Resources
from isthmus.core.settings import SlurmPoolSettings
from isthmus.core.units import parse_bytes
from isthmus.platforms.slurm.records import Waiting

_NEXT = "Resources"  # the reason of the job that is to start next, once there is room
_BEHIND = "Priority"  # and of one that waits for others to start first


class Member(NamedTuple):
    """One allocation of a pool.

    is_running  it has a node; else it waits in Slurm's queue
    is_ready    its agent has dialled in
    idle_s      since it last had a lease, or was submitted
    left_s      until its time limit; infinite while it waits
    is_left     it has been leaving for so long that nobody can be about to get a lease there
    """

    job: int
    is_running: bool
    is_ready: bool
    leases: int
    idle_s: float
    left_s: float = float("inf")
    is_leaving: bool = False
    is_left: bool = False


class Claim(NamedTuple):
    """Batch jobs that wait, and for how many allocations: for none while something else starts first."""

    jobs: tuple[int, ...]
    allocations: int


class Plan(NamedTuple):
    """submit: so many more; leave: jobs to take no further lease; cancel: jobs."""

    submit: int = 0
    leave: frozenset[int] = frozenset()
    cancel: frozenset[int] = frozenset()


def claim(pool: SlurmPoolSettings, partitions: frozenset[str], queue: Iterable[Waiting]) -> Claim | None:
    """What is claimed of a pool by those that wait in these partitions; in any, if none is named.

    queue  without isthmus' own jobs
    """
    batch = [
        one
        for one in queue
        if one.reason in (_NEXT, _BEHIND) and (not partitions or partitions & set(one.partition.split(",")))
    ]
    if not batch:
        return None
    first = [one for one in batch if one.reason == _NEXT]
    allocations = sum(max(one.nodes, -(-one.cores // pool.cores)) for one in first)
    return Claim(tuple(one.job for one in first or batch), allocations)


def plan(pool: SlurmPoolSettings, members: Sequence[Member], more: int, claimed: int | None = None) -> Plan:
    """
    more      allocations for which there are requests that found no room
    claimed   allocations that batch jobs wait for, without those handed back just now; None: none waits
    """
    if claimed is not None:
        return _yield(members, claimed)
    staying = [one for one in members if not one.is_leaving and one.left_s > pool.renew_s]
    old = [one for one in members if not one.is_leaving and one.left_s <= pool.renew_s]
    in_use = sum(one.leases > 0 for one in (*staying, *old))
    target = min(pool.maximum, max(pool.minimum, in_use + more))
    is_replaced = sum(one.is_ready for one in staying) >= target
    going = [one for one in old if is_replaced or one.left_s <= pool.renew_s / 2]
    surplus = _surplus(pool, staying, len(staying) - target)
    return Plan(
        submit=max(0, target - len(staying)),
        leave=frozenset(one.job for one in (*going, *surplus) if one.is_running),
        cancel=_over(members) | {one.job for one in surplus if not one.is_running},
    )


def _surplus(pool: SlurmPoolSettings, staying: Iterable[Member], count: int) -> list[Member]:
    """Those that nobody has needed for long: those that wait first, then those that idle longest."""
    idle = [one for one in staying if not one.leases and one.idle_s >= pool.idle_s]
    idle.sort(key=lambda one: (one.is_running, -one.idle_s))
    return idle[: max(count, 0)]


def _yield(members: Sequence[Member], claimed: int) -> Plan:
    """Hand back what is claimed, idle ones first; what waits would only compete."""
    staying = [one for one in members if one.is_running and not one.is_leaving]
    leaving = sum(one.is_running and one.is_leaving for one in members)
    staying.sort(key=lambda one: (one.leases, -one.idle_s))
    return Plan(
        leave=frozenset(one.job for one in staying[: max(claimed - leaving, 0)]),
        cancel=_over(members) | {one.job for one in members if not one.is_running},
    )


def _over(members: Iterable[Member]) -> frozenset[int]:
    return frozenset(one.job for one in members if one.is_left and not one.leases)


def fits(pool: SlurmPoolSettings, resources: Resources) -> bool:
    """Whether an empty allocation of this pool has room for such a lease."""
    is_small = resources.cores <= pool.cores and resources.memory_bytes <= parse_bytes(pool.memory)
    return is_small and not resources.gpus and not resources.amounts


def allocations_for(pool: SlurmPoolSettings, wanted: Iterable[Resources]) -> int:
    """How many allocations these leases would fill."""
    some = [one for one in wanted if fits(pool, one)]
    cores = sum(one.cores for one in some)
    memory_bytes = sum(one.memory_bytes for one in some)
    return max(-(-cores // pool.cores), -(-memory_bytes // parse_bytes(pool.memory)))
