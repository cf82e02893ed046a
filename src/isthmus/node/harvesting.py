"""Keep harvested leases within what their owner leaves idle: look, freeze, thaw, evict.

    every LOOK_S, while something harvested runs   does it get its cores? else its owner is awake: freeze
    every LOOK_S, while something is frozen        what does the owner use? does it sleep again: thaw
    every LOOK_S, while somebody else wants cores  the same: do its threads wait for each other: freeze
    every MEASURE_S, while leases are here         what does the owner use? -> slack -> freeze, thaw, evict
    every REST_S, while none are                   the same, for the site to know what can be had

The kernel has given a core back before we notice (`idling.py`); what this loop adds is that nothing harvested
lingers there, that the owner's pauses are used as soon as they begin, that memory comes back too, and that
calls which wait too long move on. A job of many threads takes long to measure, and is measured more seldom:
what the loop costs stays below COST_MAX.
Not here: deciding (`slack.py`), measuring (`owners.py`, `pressure.py`), the acts themselves (`hosting.py`).
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable

from isthmus.core.ids import LeaseId
from isthmus.core.model import EndReason
from isthmus.node import processes
from isthmus.node.hosted import Hosted
from isthmus.node.hosting import Host
from isthmus.node.owners import Lent, Owner, job_group
from isthmus.node.pressure import Stalls
from isthmus.node.slack import (
    CALM_NS,
    NO_CEILING,
    STALLED_MAX,
    Guest,
    Progress,
    Slack,
    Starving,
    judge,
    memory_ceiling,
    slack,
)

LOOK_S = 0.01
MEASURE_S = 0.1
REST_S = 0.5
FIND_S = 0.5  # how late a new process of the owner may be noticed; its cores it has at once
TELL_S = 0.25  # at least between two reports of slack
LATELY_S = 1.0
COST_MAX = 0.02  # of one core: what measuring a job at every look may take

log = logging.getLogger("isthmus.agent")


class Harvesting:
    """tell  sends a heartbeat now, with the slack in it"""

    def __init__(self, lent: Lent, host: Host, patience_s: float, tell: Callable[[], None]) -> None:
        self._lent = lent
        self._host = host
        self._patience_ns = int(patience_s * 1e9)
        self._tell = tell
        self._owner = Owner(lent.job)
        self._stalls = Stalls(job_group(lent.job))
        self._calm_since_ns = -CALM_NS
        self._is_stalled = False
        self._ceiling_bytes = NO_CEILING
        self._machine_cores = os.cpu_count() or 1
        self._starving = Starving()
        self._is_contended = False
        self._cpu_ns: dict[LeaseId, int] = {}
        self._looked_ns = 0
        self._measured_ns = self._found_ns = self._told_ns = self._noted_ns = self._cost_ns = 0
        self._used_cores = 0.0
        self._told = Slack(0, 0)
        self._now = self._offered = Slack(0, 0)
        self._lately: deque[tuple[int, Slack]] = deque()
        self._evictions: set[asyncio.Task[None]] = set()

    @property
    def slack(self) -> Slack:
        """What idled all the time lately: worth a new lease. Shorter lulls serve those that are here."""
        return Slack(
            min((one.cores for _, one in self._lately), default=0),
            min((one.memory_bytes for _, one in self._lately), default=0),
        )

    async def run(self) -> None:
        """Until cancelled."""
        log.info("memory pressure is read from: %s", self._stalls.source)
        self._measure(time.monotonic_ns(), [])
        await asyncio.sleep(MEASURE_S)
        while True:
            await asyncio.sleep(self._step(time.monotonic_ns()))

    def _step(self, now_ns: int) -> float:
        """One round; how long to sleep until the next."""
        guests = self._host.guests()
        running = [guest for guest in guests if not guest.frozen_ns]
        progress = self._progress(running, now_ns)
        self._is_contended = any(one.wants for one in progress)
        for lease in self._starving.look(progress):
            log.info("%s: somebody else wants its core, frozen", lease)
            self._host.freeze(lease, now_ns)
        if self._is_due(guests, now_ns):
            shown = [_shown(hosted) for hosted in guests]
            self._measure(now_ns, shown)
            self._keep_within_slack(shown, now_ns)
        return LOOK_S if running else self._pause_s(guests)

    def _is_due(self, guests: list[Hosted], now_ns: int) -> bool:
        """Whether the owner is to be measured now. In between only where a core may have become idle."""
        if now_ns - self._measured_ns >= (MEASURE_S if guests else REST_S) * 0.99e9:
            return True
        if now_ns - self._measured_ns < self._pause_s(guests) * 0.99e9:
            return False
        return self._is_contended or processes.running_count() <= self._machine_cores

    def _pause_s(self, guests: list[Hosted]) -> float:
        """Between two measurements of the owner."""
        if not guests:
            return REST_S
        if self._is_contended or any(guest.frozen_ns for guest in guests):
            return min(MEASURE_S, max(LOOK_S, self._cost_ns / COST_MAX / 1e9))
        return MEASURE_S

    def _progress(self, running: list[Hosted], now_ns: int) -> list[Progress]:
        """What the main threads of each lease got: there user code runs."""
        span_ns = max(1, now_ns - self._looked_ns)
        before, self._cpu_ns, self._looked_ns = self._cpu_ns, {}, now_ns
        progress = []
        for hosted in running:
            pids = [executor.info.pid for executor in hosted.executors.values()]
            spent_ns = self._cpu_ns[hosted.lease] = sum(map(processes.main_thread_ns, pids))
            if hosted.lease in before:
                share = (spent_ns - before[hosted.lease]) / span_ns
                wants = share < Starving.SHARE_FULL and any(map(processes.is_runnable, pids))
                progress.append(Progress(hosted.lease, wants, share))
        return progress

    def _measure(self, now_ns: int, guests: list[Guest]) -> None:
        if now_ns - self._found_ns >= FIND_S * 1e9:
            self._found_ns = now_ns
            self._owner.find()
        began_ns = time.thread_time_ns()
        used = self._owner.sample(now_ns)
        self._measured_ns, self._used_cores = now_ns, used.cores
        is_due = now_ns - self._noted_ns >= MEASURE_S * 0.99e9
        if is_due:
            self._feel_pressure(guests, now_ns)
        lent = self._lent
        idle = slack(lent.cores, lent.memory_bytes, lent.held_bytes, used.cores, used.memory_bytes)
        self._offered = idle._replace(memory_bytes=min(idle.memory_bytes, self._ceiling_bytes))
        self._now = self._offered if self._is_stalled else idle  # else the ceiling only keeps new leases away
        self._cost_ns = time.thread_time_ns() - began_ns
        if is_due:
            self._note(now_ns)

    def _feel_pressure(self, guests: list[Guest], now_ns: int) -> None:
        stalled = self._stalls.share(now_ns)
        self._is_stalled = stalled > STALLED_MAX
        if self._is_stalled:
            self._calm_since_ns = now_ns
        harvested_bytes = sum(guest.memory_bytes for guest in guests)
        calm_ns = now_ns - self._calm_since_ns
        self._ceiling_bytes = memory_ceiling(harvested_bytes, stalled, calm_ns, self._ceiling_bytes)

    def _note(self, now_ns: int) -> None:
        """Remember it, and tell the site if what idled all the time is another number of cores."""
        self._noted_ns = now_ns
        self._lately.append((now_ns, self._offered))
        while now_ns - self._lately[0][0] > LATELY_S * 1e9:
            self._lately.popleft()
        if self.slack.cores != self._told.cores and now_ns - self._told_ns >= TELL_S * 1e9:
            self._say(now_ns)

    def _say(self, now_ns: int) -> None:
        self._told, self._told_ns = self.slack, now_ns
        self._tell()

    def _keep_within_slack(self, guests: list[Guest], now_ns: int) -> None:
        sizes = {guest.lease: guest.memory_bytes for guest in guests}
        verdict = judge(guests, self._now, now_ns, self._patience_ns)
        for lease in verdict.freeze:
            self._host.freeze(lease, now_ns)
        for lease in verdict.thaw:
            self._host.thaw(lease)
        if verdict.evict:
            self._lately.append(
                (now_ns, self._offered)
            )  # why they go, should it be younger than the last note
            self._say(now_ns)  # before their ends: or the site would place them here again
        for lease in verdict.evict:
            self._evict(lease, is_short_of_memory=sizes[lease] > self._now.memory_bytes)

    def _evict(self, lease: LeaseId, is_short_of_memory: bool) -> None:
        owner = f"its owner, job {self._lent.job},"
        detail = (
            f"{owner} needs its memory"
            if is_short_of_memory
            else f"{owner} uses {self._used_cores:.1f} of {self._lent.cores} cores"
        )
        log.info("%s: evicted: %s", lease, detail)
        ending = self._host.end(lease, EndReason.EVICTED, 0.0, detail)
        task = asyncio.create_task(ending, name=f"evict-{lease}")
        self._evictions.add(task)
        task.add_done_callback(self._evictions.discard)


def _shown(hosted: Hosted) -> Guest:
    """What it takes, for the verdict."""
    memory_bytes = sum(processes.rss_bytes(executor.info.pid) for executor in hosted.executors.values())
    return Guest(hosted.lease, hosted.record.resources.cores, memory_bytes, hosted.frozen_ns)
