"""Pools of allocations that stand ready: jobs whose agents have dialled in, each a node for elastic leases.

    sbatch (one job, one node, its script is the agent) -> node `n3.burst.42` -> leases there

One job for each allocation, not one of many nodes and no array: each is granted, preempted, put back into the
queue, replaced and handed back by itself. A job says in its comment which pool of which site it is for, so a
site that comes back finds it again, and no other site touches it.

Invariant: a reading that fails changes nothing. Each step is decided on a reading of Slurm's books that is
younger than what the step before did, so that nothing is submitted twice. Not here: how many allocations are
needed (`pooling.py`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import structlog

from isthmus.core.api import PoolReport
from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import LeaseClass, Node, Resources
from isthmus.core.settings import SlurmPoolSettings, SlurmSettings
from isthmus.platforms.bookings import Bookings
from isthmus.platforms.platform import Allocation, AllocationState
from isthmus.platforms.slurm import pooling, reasons
from isthmus.platforms.slurm.client import RefusedError, SlurmClient
from isthmus.platforms.slurm.pool_agents import PoolAgents, job_of
from isthmus.platforms.slurm.pool_members import Member, as_node
from isthmus.platforms.slurm.records import Job, Waiting, new_job, pool_of
from isthmus.platforms.slurm.watching import Reading, Watch, gone

RETRY_S = 30.0  # without a further submission after one that was refused, or whose agent did not come
HANDED_BACK_S = 10.0  # what was handed back counts for so long: Slurm takes a while to start who waits
JOBS_SHOWN_MAX = 3  # of those that wait
SUBMITS_MAX = 8  # in one step: more would only queue up in slurmctld
_log = structlog.get_logger("platforms.slurm")


class Pools:
    """
    joined   returns when the agent of this name has dialled in
    dismiss  tells an agent that its job is over
    agents   how they are started
    """

    def __init__(
        self,
        settings: SlurmSettings,
        client: SlurmClient,
        watch: Watch,
        joined: Callable[[NodeId], Awaitable[None]],
        dismiss: Callable[[NodeId], Awaitable[None]],
        agents: PoolAgents,
    ) -> None:
        self._settings = settings
        self._client = client
        self._watch = watch
        self._joined = joined
        self._dismiss = dismiss
        self._agents = agents
        self._members: dict[int, Member] = {}
        self._bookings = Bookings(())
        self._cold: list[Resources] = []
        self._waiting: tuple[Resources, ...] = ()
        self._outage = ""
        self._trouble: dict[str, str] = {}
        self._claims: dict[str, str] = {}
        self._handed_back: dict[str, list[float]] = {}
        self._retry_at: dict[str, float] = {}
        self._acted_at = 0.0
        self._seen_at = float("-inf")
        self._needed = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None
        self._removing: set[asyncio.Task[None]] = set()

    # what there is ------------------------------------------------------------------------------------------
    @property
    def awaits_agents(self) -> bool:
        """An agent that nobody knows yet may be one of ours."""
        return any(not member.is_ready for member in self._members.values())

    def nodes(self) -> tuple[Node, ...]:
        return tuple(as_node(member) for member in self._members.values() if member.is_running)

    def states(self) -> dict[AllocationId, AllocationState]:
        """Of leases' allocations on its nodes."""
        here = {member.node: member for member in self._members.values() if member.is_running}
        states: dict[AllocationId, AllocationState] = {}
        for allocation in self._bookings.states():
            held = self._bookings.held(allocation)
            member = here.get(held.node) if held is not None else None
            states[allocation] = member.lends if member is not None else "ended"
        return states

    async def see(self, reading: Reading[Job]) -> None:
        """Take in what Slurm says of our jobs, unless it has said something newer since."""
        if reading.began_at < self._seen_at:
            return
        self._seen_at = reading.began_at
        listed: set[int] = set()
        for job in reading.rows:
            pool = pool_of(job, self._agents.site)
            if pool is None:
                continue
            listed.add(job.job)
            if reasons.allocation_state(job.state) == "ended" and job.state != "COMPLETING":
                self._lose(job.job)
            elif job.job in self._members or job.state != "COMPLETING":  # it may yet come back to the queue
                self._take_in(pool, job)
        for number, member in list(self._members.items()):
            if number not in listed and member.seen_at < reading.began_at:
                state, _ = await self._client.state(number)
                if reasons.allocation_state(state) == "ended":
                    self._lose(number)
        self._list_nodes()

    def _take_in(self, pool: str, job: Job) -> None:
        member = self._members.get(job.job)
        if member is None:
            member = self._members[job.job] = Member(pool, job)
            _log.info("a pool has a job", pool=pool, job=job.job, state=job.state)
        before = member.job.node
        member.job = job
        if member.arrival is not None and (member.is_waiting or job.node != before):
            member.begin_anew()
        if member.is_running and member.arrival is None:
            member.arrival = asyncio.create_task(
                self._await_agent(member), name=f"platforms.slurm.arrival {job.job}"
            )

    async def _await_agent(self, member: Member) -> None:
        """Its agent has dialled in; or its job is cancelled, because it is of no use."""
        try:
            async with asyncio.timeout(self._settings.agent_start_s):
                await self._joined(member.node)
            member.is_ready = True
            member.idle_since = time.monotonic()
            self._trouble.pop(member.pool, None)
        except TimeoutError:
            where = f"job {member.job.job} on {member.job.node}"
            within = f"within {self._settings.agent_start_s:g} s; see {self._agents.log}"
            words = f"the agent of {where} did not dial {self._agents.url} {within}"
            self._fail(member.pool, words)
            member.left_at = 0.0
        self._needed.set()

    def _lose(self, number: int) -> None:
        member = self._members.pop(number, None)
        if member is None:
            return
        self._list_nodes()
        _log.info("a pool has lost a job", pool=member.pool, job=number)
        if member.arrival is not None and not member.is_ready and not member.is_leaving:
            words = f"job {number} ended before its agent had dialled in; see {self._agents.log}"
            self._fail(member.pool, words)
        member.forget_agent()
        removing = asyncio.create_task(self._remove(member), name=f"platforms.slurm.remove {number}")
        self._removing.add(removing)
        removing.add_done_callback(self._removing.discard)

    def _fail(self, pool: str, words: str) -> None:
        self._trouble[pool] = words
        self._retry_at[pool] = time.monotonic() + RETRY_S
        _log.error("a pool's allocation is of no use", pool=pool, why=words)

    def _list_nodes(self) -> None:
        self._bookings.nodes = self.nodes()

    # leases -------------------------------------------------------------------------------------------------
    def acquire(self, allocation: AllocationId, node: NodeId, resources: Resources) -> Allocation:
        """Raises NoCapacityError."""
        taken = self._bookings.book(allocation, node, resources)
        member = next(one for one in self._members.values() if one.node == node)
        member.idle_since = time.monotonic()
        return msgspec.structs.replace(taken, closes_s=member.job.ends_s - self._settings.close_s)

    def release(self, allocation: AllocationId) -> bool:
        """Whether it was on one of our nodes."""
        held = self._bookings.held(allocation)
        if held is None:
            return False
        self._bookings.free(allocation)
        for member in self._members.values():
            if member.node == held.node:
                member.idle_since = time.monotonic()
        return True

    async def fate(self, allocation: AllocationId, node: NodeId) -> Allocation:
        """Raises SiteUnavailableError."""
        number = job_of(node)
        assert number is not None
        held = self._bookings.held(allocation)
        resources = held.resources if held is not None else Resources()
        found = Allocation(allocation=allocation, node=node, state="running", resources=resources)
        member = self._members.get(number)
        if member is not None and member.claimed:
            return msgspec.structs.replace(found, state="leaving", detail=member.claimed)
        state, reason = await self._watch.settled(number)
        member = self._members.get(number)
        has_moved = member is not None and member.is_running and member.node != node
        if reasons.allocation_state(state) == "running" and not has_moved:
            return found
        detail = reasons.why_ended(number, "PENDING" if has_moved else state, reason)
        return msgspec.structs.replace(
            found, state="ended", end_reason=reasons.end_reason(state), detail=detail
        )

    # what is wanted -----------------------------------------------------------------------------------------
    def note_cold(self, resources: Resources, lease_class: LeaseClass) -> None:
        """A lease gets a job of its own, because no pool had room for it."""
        if lease_class is LeaseClass.ELASTIC:
            self._cold.append(resources)
            self._needed.set()

    def want(self, waiting: Sequence[Resources]) -> None:
        """What waits now."""
        if waiting and not self._waiting:
            self._needed.set()
        self._waiting = tuple(waiting)

    def report(self) -> tuple[PoolReport, ...]:
        return tuple(self._report(name, pool) for name, pool in self._settings.pools.items())

    def _report(self, name: str, pool: SlurmPoolSettings) -> PoolReport:
        members = [one for one in self._members.values() if one.pool == name]
        running = [one for one in members if one.is_running]
        held = [one for one in map(self._bookings.held, self._bookings.states()) if one is not None]
        here = [one for one in held if one.node in {member.node for member in running}]
        cores = sum(member.job.cores for member in running)
        free = sum(member.job.cores for member in running if member.is_open)
        return PoolReport(
            pool=name,
            contract=pool.contract,
            minimum=pool.minimum,
            maximum=pool.maximum,
            running=len(running),
            waiting=sum(one.is_waiting for one in members),
            leases=len(here),
            cores=cores,
            cores_free=max(0, free - sum(one.resources.cores for one in here)),
            words=tuple(self._words(name, members)),
        )

    def _words(self, name: str, members: list[Member]) -> list[str]:
        """Why it is not larger, or what is about to change."""
        words = [
            f"job {one.job.job} waits: {reasons.why_pending(one.job.reason)}"
            for one in members
            if one.is_waiting
        ]
        words += [
            f"job {one.job.job} on {one.job.node} is suspended: batch jobs have its cores"
            for one in members
            if one.is_suspended
        ]
        starting = [one for one in members if one.is_running and not one.is_ready]
        words += [f"the agent of job {one.job.job} is starting on {one.job.node}" for one in starting]
        words += [f"job {one.job.job} on {one.job.node} is about to go" for one in members if one.is_leaving]
        more = self._claims.get(name), self._trouble.get(name), self._outage
        return words + [why for why in more if why]

    # the loop -----------------------------------------------------------------------------------------------
    def start(self) -> None:
        if self._settings.pools and self._stepping is None:
            self._stepping = asyncio.create_task(self._run(), name="platforms.slurm.pools")

    async def _run(self) -> None:
        while True:
            try:
                await self._step()
                self._outage = ""
            except SiteUnavailableError as error:
                self._outage = f"Slurm does not answer: {error}"
                _log.warning("pools stay as they are", why=str(error))
            except Exception as error:  # nobody waits for this task: without it no pool would ever change
                self._outage = f"a step failed by a fault of isthmus, see the site's log: {error!r}"
                _log.exception("a step of the pools failed; the next one tries again")
            try:
                async with asyncio.timeout(self._settings.tick_s):
                    await self._needed.wait()
            except TimeoutError:
                pass
            self._needed.clear()

    async def _step(self) -> None:
        queue, asked_at = await self._queue(), time.monotonic()
        reading = await self._watch.jobs(max(self._acted_at, asked_at) if queue else self._acted_at)
        await self.see(reading)
        ours = {job.job for job in reading.rows if not job.is_batch}
        claims = self._find_claims([one for one in queue if one.job not in ours])
        wanted, self._cold = [*self._waiting, *self._cold], []
        for name, pool in self._settings.pools.items():
            more = pooling.allocations_for(pool, wanted)
            wanted = [one for one in wanted if not pooling.fits(pool, one)]
            claimed = self._claimed(name, claims.get(name))
            await self._carry_out(name, pooling.plan(pool, self._described(name), more, claimed))
        for member in list(self._members.values()):
            if member.pool not in self._settings.pools:  # of a pool that the settings do not name any more
                await self._cancel(member)

    async def _queue(self) -> tuple[Waiting, ...]:
        """Asked for before our jobs are: these then name all of ours that are in it."""
        return await self._client.queue() if self._giving else ()

    @property
    def _giving(self) -> dict[str, SlurmPoolSettings]:
        """Pools that promise to go when batch jobs wait."""
        return {name: pool for name, pool in self._settings.pools.items() if pool.contract == "drain"}

    def _find_claims(self, queue: Sequence[Waiting]) -> dict[str, pooling.Claim]:
        """On which pools those have one that wait and are none of ours."""
        claims: dict[str, pooling.Claim] = {}
        for name, pool in self._giving.items():
            own = self._agents.request(name, pool).partition(self._settings)
            found = pooling.claim(pool, frozenset({own, self._settings.partition} - {""}), queue)
            if found is not None:
                claims[name] = found
        return claims

    def _claimed(self, name: str, claim: pooling.Claim | None) -> int | None:
        """Allocations to hand back yet."""
        if claim is None:
            self._claims.pop(name, None)
            return None
        jobs = ", ".join(map(str, claim.jobs[:JOBS_SHOWN_MAX]))
        self._claims[name] = f"batch jobs come first, and some wait ({jobs})"
        since = time.monotonic() - HANDED_BACK_S
        recent = self._handed_back[name] = [at for at in self._handed_back.get(name, []) if at > since]
        return max(0, claim.allocations - len(recent))

    def _described(self, name: str) -> list[pooling.Member]:
        now, now_s = time.monotonic(), time.time()
        leases = self._leases()
        return [
            pooling.Member(
                job=member.job.job,
                is_running=member.is_running,
                is_ready=member.is_ready,
                leases=leases[member.node],
                idle_s=now - member.idle_since,
                left_s=member.left_s(now_s),
                is_leaving=member.is_leaving,
                is_left=now - member.left_at > 2 * self._settings.tick_s,
            )
            for member in self._members.values()
            if member.pool == name
        ]

    def _leases(self) -> Counter[NodeId]:
        """How many each node has."""
        held = map(self._bookings.held, self._bookings.states())
        return Counter(one.node for one in held if one is not None)

    async def _remove(self, member: Member) -> None:
        """The agent, should Slurm not have been able to end it, and what it wrote."""
        number = member.job.job
        await self._dismiss(member.node)
        try:
            await self._client.remove(self._agents.state(number))
        except SiteUnavailableError as error:
            _log.warning("what an agent wrote is still there", job=number, why=str(error))

    async def _carry_out(self, name: str, plan: pooling.Plan) -> None:
        for number in plan.leave:
            self._members[number].left_at = time.monotonic()
            self._members[number].claimed = self._claims.get(name, "")
        for number in plan.cancel:
            member = self._members.get(number)
            if member is None or self._is_taken(member):  # others act during each await
                continue
            if member.claimed and member.is_running:
                self._handed_back.setdefault(name, []).append(time.monotonic())
            await self._cancel(member)
        for _ in range(min(plan.submit, SUBMITS_MAX)):
            if time.monotonic() >= self._retry_at.get(name, 0.0):
                await self._submit(name)

    def _is_taken(self, member: Member) -> bool:
        """It began to run and is open to leases, or has one."""
        return member.node in self._leases() or (member.is_running and not member.is_leaving)

    async def _submit(self, name: str) -> None:
        self._acted_at = float("inf")  # what comes of it is not in any list before it is over
        try:
            number = await self._client.submit(self._agents.request(name, self._settings.pools[name]))
        except RefusedError as error:
            self._fail(name, str(error))
        else:
            self._take_in(name, new_job(number))
        finally:
            self._acted_at = time.monotonic()

    async def _cancel(self, member: Member) -> None:
        await self._client.cancel(member.job.job)
        self._acted_at = time.monotonic()
        member.left_at = min(member.left_at, self._acted_at)

    async def close(self) -> None:
        """Cancel all of it, and wait until Slurm has ended it."""
        if self._stepping is None:
            return
        self._stepping.cancel()
        await asyncio.gather(self._stepping, return_exceptions=True)
        self._stepping = None
        try:
            await self.see(await self._watch.jobs(time.monotonic()))
            numbers = list(self._members)
            for member in list(self._members.values()):
                await self._cancel(member)
            for number in numbers:
                if not await gone(self._client, number, self._settings.command_timeout_s):
                    _log.warning("a cancelled job has not ended yet", job=number)
                self._lose(number)
        except SiteUnavailableError as error:
            _log.error("jobs of pools may be left in Slurm's queue", why=str(error))
        await asyncio.gather(*self._removing, return_exceptions=True)
