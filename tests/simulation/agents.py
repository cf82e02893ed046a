"""The in-memory twin of a node's agent and its executors, as far as the control plane can tell them apart.

Executors (`running`) belong to the machine: they outlive the agent, and end by themselves when their deadline
and the orphans' time have passed. The agent's memory (`refused`: leases that were ended before they began)
dies with it.
"""

import asyncio
import random

import msgspec

from isthmus.core.clock import Clock
from isthmus.core.ids import ExecutorId, LeaseId, NodeId
from isthmus.core.model import EndReason, Enforcement, ExecutorInfo, Node, Resources, Usage
from isthmus.node.messages import (
    AddExecutor,
    AgentHello,
    Done,
    DrainLease,
    EndLease,
    ExecutorEnded,
    Failed,
    Heartbeat,
    KillExecutor,
    LeaseEnded,
    LeaseReport,
    Order,
    RenewLease,
    RunningLease,
    StartLease,
    Warm,
)

BANDWIDTH = 10  # of each node, in bits per second
START_FAILURE = 0.03  # chance that an environment cannot be built
EXECUTOR_DEATH = 0.002  # chance per lease and heartbeat that its executor dies by itself
Report = Heartbeat | ExecutorEnded | LeaseEnded


class OverCommitError(AssertionError):
    """More runs on a node than it has: the one thing that must never happen."""


class RunningTwin:
    """A lease that really runs. `dies_at`: in monotonic seconds, when its executors end by themselves."""

    def __init__(self, order: StartLease, executor: ExecutorInfo, dies_at: float, now: float) -> None:
        self.lease = order.lease
        self.resources: Resources = order.resources
        self.executors = [executor]
        self.dies_at = dies_at
        self.deadline_s = order.deadline_s
        self.started_at = now
        self.called_at = now

    def offered(self, now: float) -> RunningLease:
        executors = tuple(self.executors)
        return RunningLease(
            lease=self.lease, executors=executors, deadline_s=self.deadline_s, usage=self.usage(now)
        )

    def usage(self, now: float) -> Usage:
        alive_s = now - self.started_at
        return Usage(allocated_core_s=alive_s * self.resources.cores, calls=int(alive_s * 10))


class AgentTwin:
    def __init__(
        self, node: Node, clock: Clock, chance: random.Random, lease_s: float, orphan_s: float
    ) -> None:
        self.node = node
        self._clock = clock
        self._chance = chance
        self._lease_s = lease_s
        self._orphan_s = orphan_s
        self.running: dict[LeaseId, RunningTwin] = {}
        self.reports: list[Report] = []  # not yet seen by a site
        self.refused: dict[LeaseId, None] = {}
        self.is_up = True
        self.life = 0
        self._executors = 0

    # faults -------------------------------------------------------------------------------------------------
    def crash(self) -> None:
        """The agent dies; what it runs goes on."""
        self.is_up = False
        self.life += 1
        self.refused.clear()

    def reboot(self) -> None:
        """The machine goes down and comes back: nothing runs any more, nothing is remembered."""
        self.crash()
        self.running.clear()
        self.reports.clear()

    # what the site sees -------------------------------------------------------------------------------------
    def hello(self) -> AgentHello:
        self._purge()
        now = self._clock.monotonic()
        return AgentHello(
            node=self.node.node, nonce=b"", proof=b"", version="", python="", hostname="", pid=self.life,
            cores=self.node.cores, memory_bytes=self.node.memory_bytes, gpus=0, enforcement=Enforcement(),
            running=tuple(twin.offered(now) for twin in self.running.values()),
        )  # fmt: skip

    def heartbeat(self) -> Heartbeat:
        self._purge()
        now = self._clock.monotonic()
        for twin in list(self.running.values()):
            if self._chance.random() < EXECUTOR_DEATH:
                self._die(twin)
        return Heartbeat(
            leases=tuple(
                LeaseReport(lease=twin.lease, usage=twin.usage(now), idle_s=now - twin.called_at)
                for twin in self.running.values()
            )
        )

    async def carry_out(self, order: Order) -> Done | Failed:
        """Idempotent: an order that is repeated is answered as before."""
        self._purge()
        match order:
            case StartLease():
                return await self._start(order)
            case EndLease():
                return await self._end(order)
            case RenewLease():
                return self._renew(order)
            case AddExecutor() | KillExecutor() | DrainLease():
                return self._other(order)
            case Warm():
                return Done(number=order.number)
            case _:
                raise AssertionError(f"the site gave an order this twin does not know: {order}")

    # orders -------------------------------------------------------------------------------------------------
    async def _start(self, order: StartLease) -> Done | Failed:
        life = self.life
        if order.lease not in self.running:
            await asyncio.sleep(self._chance.uniform(0.005, 0.5))
        if life != self.life or order.lease in self.refused:
            return Failed(number=order.number, code="LeaseEndedError", message="ended before it began")
        if order.lease not in self.running:
            left_s = self._left_s(order.deadline_s)
            if left_s <= 0 or self._chance.random() < START_FAILURE:
                self.refused[order.lease] = None
                return Failed(number=order.number, code="FunctionLoadError", message="no such environment")
            now = self._clock.monotonic()
            self.running[order.lease] = RunningTwin(
                order, self._executor(), now + left_s + self._orphan_s, now
            )
            self.check_capacity()
        twin = self.running[order.lease]
        return Done(number=order.number, executor=twin.executors[0], enforcement=Enforcement())

    async def _end(self, order: EndLease) -> Done:
        self.refused[order.lease] = None
        twin = self.running.get(order.lease)
        if twin is not None:
            await asyncio.sleep(self._chance.uniform(0.0, order.grace_s))
            self._gone(twin, order.reason, "")
        return Done(number=order.number)

    def _renew(self, order: RenewLease) -> Done | Failed:
        twin = self.running.get(order.lease)
        if twin is None:
            return Failed(number=order.number, code="NotFoundError", message=f"no lease {order.lease}")
        twin.deadline_s = order.deadline_s
        latest = self._clock.monotonic() + self._left_s(order.deadline_s) + self._orphan_s
        twin.dies_at = max(twin.dies_at, latest)
        return Done(number=order.number)

    def _other(self, order: AddExecutor | KillExecutor | DrainLease) -> Done | Failed:
        twin = self.running.get(order.lease)
        if twin is None:
            return Failed(number=order.number, code="NotFoundError", message=f"no lease {order.lease}")
        if isinstance(order, AddExecutor):
            twin.executors.append(self._executor())
            return Done(number=order.number, executor=twin.executors[-1])
        if isinstance(order, KillExecutor):
            self._die(twin)
        return Done(number=order.number, killed=True)

    # executors ----------------------------------------------------------------------------------------------
    def check_capacity(self) -> None:
        self._purge()
        cores = sum(twin.resources.cores for twin in self.running.values())
        if cores > self.node.cores:
            raise OverCommitError(
                f"{self.node.node} runs {cores} cores' worth of leases on {self.node.cores} cores"
            )

        rate = sum(twin.resources.amounts.get("bandwidth", 0) for twin in self.running.values())
        if rate > BANDWIDTH:
            raise OverCommitError(f"{self.node.node} has {BANDWIDTH} bit/s, and runs leases of {rate}")

    def _left_s(self, deadline_s: float) -> float:
        """The life that an order gives, whatever the clocks say: they may have jumped since it was sent."""
        return min(deadline_s - self._clock.now(), self._lease_s)

    def _purge(self) -> None:
        now = self._clock.monotonic()
        for twin in [twin for twin in self.running.values() if twin.dies_at < now]:
            self._gone(twin, EndReason.EXPIRED, "fenced itself")

    def _die(self, twin: RunningTwin) -> None:
        report = ExecutorEnded(
            lease=twin.lease,
            executor=twin.executors[-1].executor,
            reason=EndReason.EXITED,
            detail="exit code 3",
        )
        self.reports.append(report)
        twin.executors.pop()
        if not twin.executors:
            self._gone(twin, EndReason.EXITED, "exit code 3")

    def _gone(self, twin: RunningTwin, reason: EndReason, detail: str) -> None:
        if self.running.pop(twin.lease, None) is not None:
            usage = twin.usage(self._clock.monotonic())
            self.reports.append(LeaseEnded(lease=twin.lease, reason=reason, detail=detail, usage=usage))

    def _executor(self) -> ExecutorInfo:
        self._executors += 1
        name = ExecutorId(f"ex_{self.node.node}_{self._executors}")
        return ExecutorInfo(executor=name, address=f"unix:/{name}", pid=self._executors)


def nodes(count: int) -> tuple[Node, ...]:
    template = Node(
        node=NodeId("n"),
        platform="memory",
        cores=4,
        memory_bytes=64 * 2**30,
        amounts={"bandwidth": BANDWIDTH},
    )
    return tuple(
        msgspec.structs.replace(template, node=NodeId(f"n{i}"), labels={"zone": f"z{i % 2}"})
        for i in range(count)
    )
