"""One allocation of a pool as the site knows it: its job, its agent, whether it is about to go."""

import asyncio
import time

from isthmus.core.ids import NodeId
from isthmus.core.model import POOL_PLATFORM, Node
from isthmus.platforms.platform import AllocationState
from isthmus.platforms.slurm import reasons
from isthmus.platforms.slurm.pool_agents import node_name
from isthmus.platforms.slurm.records import Job


class Member:
    """One job of a pool. Times are `time.monotonic()` seconds.

    claimed   why its leases may not stay until they end by themselves: batch jobs want it back
    """

    def __init__(self, pool: str, job: Job) -> None:
        self.pool = pool
        self.job = job
        self.seen_at = self.idle_since = time.monotonic()
        self.left_at = float("inf")
        self.claimed = ""
        self.is_ready = False
        self.arrival: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        return bool(self.job.node) and reasons.allocation_state(self.job.state) == "running"

    @property
    def is_suspended(self) -> bool:
        return self.job.state in reasons.SUSPENDED

    @property
    def is_waiting(self) -> bool:
        return reasons.allocation_state(self.job.state) == "pending"

    @property
    def is_leaving(self) -> bool:
        return self.left_at < float("inf")

    @property
    def is_open(self) -> bool:
        """It takes leases."""
        return self.is_running and self.is_ready and not self.is_leaving and not self.is_suspended

    @property
    def lends(self) -> AllocationState:
        """The state of what leases have of it."""
        if not self.is_running:
            return "ended"
        return "leaving" if self.claimed else "suspended" if self.is_suspended else "running"

    def left_s(self, now_s: float) -> float:
        """Until its time limit, which does not come nearer while it waits or is suspended."""
        is_ageing = self.is_running and not self.is_suspended
        return self.job.ends_s - now_s if is_ageing else float("inf")

    @property
    def node(self) -> NodeId:
        return node_name(self.job.node, self.pool, self.job.job)

    def forget_agent(self) -> None:
        """It is gone: Slurm ended the job, put it back into the queue, or gave it another node."""
        self.is_ready = False
        if self.arrival is not None:
            self.arrival.cancel()
            self.arrival = None

    def begin_anew(self) -> None:
        self.forget_agent()
        self.claimed = ""
        self.left_at = float("inf")
        self.idle_since = time.monotonic()


def as_node(member: Member) -> Node:
    job = member.job
    return Node(
        node=member.node,
        platform=POOL_PLATFORM,
        cores=job.cores,
        memory_bytes=job.memory_bytes,
        labels={"pool": member.pool, "node": job.node, "job": str(job.job)},
        draining=member.is_leaving or member.is_suspended,
    )
