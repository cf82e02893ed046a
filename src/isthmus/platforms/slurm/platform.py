"""A Slurm cluster: a lease is a job without a shell, and the agent is a step in it.

    acquire -> salloc --no-shell (one node, some cores) -> srun --overlap (the agent) -> it dials the site

Slurm's books are the only ones: what is free, what has ended and why is read from it, once per tick. A job
says in its comment which allocation of which site it is, so a site that comes back finds its jobs again and
submits nothing twice. The `srun`s are in sessions of their own and survive the site.

Invariant: a reading that fails changes nothing; a job that is missing from a list is asked for by its number
before it counts as gone.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from isthmus.core import kinds
from isthmus.core.api import PoolReport
from isthmus.core.errors import NoCapacityError, SiteUnavailableError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.kinds import HeldBy, Stock
from isthmus.core.model import LeaseClass, Node, Resources
from isthmus.core.settings import Settings
from isthmus.core.units import format_bytes
from isthmus.node.launching import agent_url, agent_words, secrets
from isthmus.platforms.platform import Allocation, AllocationState
from isthmus.platforms.slurm import reasons
from isthmus.platforms.slurm.client import RefusedError, SlurmClient
from isthmus.platforms.slurm.lenders import LenderAgents, Lenders
from isthmus.platforms.slurm.pool_agents import PoolAgents, job_of
from isthmus.platforms.slurm.pools import Pools
from isthmus.platforms.slurm.records import (
    Job,
    JobRequest,
    NodeUse,
    Program,
    allocation_of,
)
from isthmus.platforms.slurm.watching import Watch, gone

STEP_TRIES = 3  # starts of one agent before its allocation is given up
STEP_PAUSE_S = 0.5
_log = structlog.get_logger("platforms.slurm")


class _Held:
    """An allocation that is ours. `granted_at`: monotonic; a list that began before need not have it."""

    def __init__(self, job: int, allocation: Allocation, granted_at: float) -> None:
        self.job = job
        self.allocation = allocation
        self.granted_at = granted_at


class SlurmPlatform:
    """
    site_url  where agents dial, http://HOST:PORT; compute nodes must be able to reach it
    join_key  what agents and site prove to each other that they hold; also names the site to Slurm
    joined    returns when the agent of this name has dialled in
    dismiss   tells an agent that its allocation is over: Slurm cannot, where slurmd is lost
    client    how Slurm is spoken to; closed with the platform
    """

    name = "slurm"

    def __init__(
        self,
        settings: Settings,
        state: Path,
        site_url: str,
        join_key: bytes,
        joined: Callable[[NodeId], Awaitable[None]],
        dismiss: Callable[[NodeId], Awaitable[None]],
        client: SlurmClient,
    ) -> None:
        self._settings = settings.slurm
        self._node_settings = settings.node
        self._licenses = settings.leasing.licenses
        self._agents = Path(settings.slurm.agent_dir or state / "agents")
        self._log_path = str((self._agents if settings.slurm.agent_dir else state / "logs") / "srun.log")
        tunnel = settings.slurm.ssh.tunnel and f"http://{settings.slurm.ssh.tunnel}"
        url = settings.slurm.site_url or tunnel or site_url
        self._agent_url = agent_url(url)
        self._join_key = join_key
        self._site = hashlib.blake2b(join_key, digest_size=4, person=b"isthmus-site").hexdigest()
        self._joined = joined
        self._dismiss = dismiss
        self._client = client
        self._watch = Watch(client, settings.slurm.tick_s)
        agents = PoolAgents(
            site=self._site, url=self._agent_url, directory=str(self._agents), log=self._log_path,
            python=self._settings.python, join_key=join_key, node_settings=settings.node,
        )  # fmt: skip
        self._pools = Pools(self._settings, client, self._watch, joined, dismiss, agents)
        self._lenders = self._open_lenders() if settings.slurm.lend_directives else None
        self._held: dict[AllocationId, _Held] = {}
        self._acquiring: dict[AllocationId, asyncio.Task[Allocation]] = {}
        self._steps: dict[AllocationId, asyncio.Task[str]] = {}
        self._cleaning: set[asyncio.Task[None]] = set()
        self.survey_s = settings.slurm.tick_s

    def _open_lenders(self) -> Lenders | None:
        steps = self._client.steps
        if steps is None:
            return None
        agents = LenderAgents(
            url=self._agent_url, log=self._log_path, python=self._settings.python,
            join_key=self._join_key, node_settings=self._node_settings,
        )  # fmt: skip
        return Lenders(steps, agents, self._joined)

    async def start(self) -> None:
        """Find the jobs of the site that was here before. Slurm may be down: then later."""
        try:
            await self.allocations()
        except SiteUnavailableError as error:
            _log.error("Slurm does not answer; `isthmus doctor` looks for the cause", why=str(error))
        self._pools.start()

    async def close(self) -> None:
        """Cancel what is still held, and wait until Slurm has ended it. Twice is fine."""
        await self._pools.close()
        if self._lenders is not None:
            await self._lenders.close()
        taking = list(self._acquiring.values())
        for task in taking:
            task.cancel()
        await asyncio.gather(*taking, return_exceptions=True)
        for allocation in list(self._held):
            await self._release_quietly(allocation)
        await asyncio.gather(*self._cleaning, return_exceptions=True)
        for step in self._steps.values():
            step.cancel()
        await asyncio.gather(*self._steps.values(), return_exceptions=True)
        self._steps.clear()
        await self._client.close()

    def agent_of(self, allocation: AllocationId, node: NodeId) -> NodeId | None:
        return None if job_of(node) is not None else NodeId(allocation)

    def want(self, waiting: Sequence[Resources]) -> None:
        self._pools.want(waiting)

    def pools(self) -> tuple[PoolReport, ...]:
        return self._pools.report()

    # what there is ------------------------------------------------------------------------------------------
    async def nodes(self) -> tuple[Node, ...]:
        not_before = time.monotonic() if self._pools.awaits_agents else 0.0
        uses, jobs = await asyncio.gather(self._watch.nodes(), self._watch.jobs(not_before))
        await self._pools.see(jobs)
        ours = [job for job in jobs.rows if self._is_ours(job) and job.state in reasons.HOLDING]
        own = tuple(self._node(use, [job for job in ours if job.node == use.node]) for use in uses.rows)
        return own + self._pools.nodes()

    def _node(self, use: NodeUse, ours: list[Job]) -> Node:
        gpus_ours = sum(
            held.allocation.resources.gpus for held in self._held.values() if held.allocation.node == use.node
        )
        return Node(
            node=use.node,
            platform=self.name,
            cores=use.cores,
            memory_bytes=use.memory_bytes,
            gpus=use.gpus,
            labels={"features": ",".join(use.features)} if use.features else {},
            agent="on-demand",
            draining=use.state not in reasons.USABLE_NODES,
            draining_why="" if use.state in reasons.USABLE_NODES else reasons.why_closed(use),
            other_cores=max(0, use.cores_held - sum(job.cores for job in ours)),
            other_memory_bytes=max(0, use.memory_held_bytes - sum(job.memory_bytes for job in ours)),
            other_gpus=max(0, use.gpus_held - gpus_ours),
            amounts=self._node_settings.amounts,
        )

    async def stocks(self) -> dict[str, Stock]:
        """Slurm's licences, and those that only the settings name."""
        reading, jobs = await asyncio.gather(self._watch.licenses(), self._watch.jobs())
        stocks = {kind: Stock(total=count) for kind, count in kinds.amounts(self._licenses).items()}
        ours = [job for job in jobs.rows if self._is_ours(job) and job.state in reasons.HOLDING]
        for row in reading.rows:
            held = sum(job.licenses.get(row.name, 0) for job in ours)
            others = max(0, row.total - row.free - held) + row.reserved
            for kind, total in kinds.amounts({row.name: row.total}).items():
                stocks[kind] = _fewer(Stock(total=total, others=min(others, total)), stocks.get(kind))
        return stocks

    async def allocations(self) -> dict[AllocationId, AllocationState] | None:
        """None when Slurm cannot be asked."""
        try:
            reading = await self._watch.jobs()
        except SiteUnavailableError as error:
            _log.warning("Slurm's jobs cannot be read; nothing changes", why=str(error))
            return None
        if self._lenders is not None:
            self._lenders.see(job for job in reading.rows if job.is_batch and job.state == "RUNNING")
        states: dict[AllocationId, AllocationState] = {}
        for job in reading.rows:
            allocation = allocation_of(job, self._site)
            if allocation is None:
                continue
            state = reasons.allocation_state(job.state)
            if state != "ended" or allocation in self._held:
                states[allocation] = state
            if state == "running" and allocation not in self._acquiring:
                self._adopt(allocation, job)
        for allocation, held in self._held.items():
            if allocation not in states:
                states[allocation] = await self._state_of_missing(held, reading.began_at)
        return states | self._pools.states()

    def _adopt(self, allocation: AllocationId, job: Job) -> None:
        if allocation in self._held:
            return
        resources = Resources(
            cores=max(1, job.cores), memory=max(16 * 2**20, job.memory_bytes), licenses=job.licenses
        )
        found = Allocation(
            allocation=allocation, node=job.node, state="running", resources=resources,
            closes_s=self._closes_s(job.ends_s), holds=_held(job.licenses),
        )  # fmt: skip
        _log.info("found our job again", allocation=allocation, job=job.job, node=job.node)
        self._held[allocation] = _Held(job.job, found, time.monotonic())

    async def _state_of_missing(self, held: _Held, began_at: float) -> AllocationState:
        """A job that the list does not have: too new for it, forgotten by Slurm, or the list was cut."""
        if held.granted_at >= began_at:
            return "running"
        try:
            state, _ = await self._client.state(held.job)
        except SiteUnavailableError:
            return "running"
        return reasons.allocation_state(state)

    async def fate(self, allocation: AllocationId, node: NodeId) -> Allocation | None:
        if job_of(node) is not None:
            return await self._pools.fate(allocation, node)
        reading = await self._watch.jobs()
        job = next((job for job in reading.rows if allocation_of(job, self._site) == allocation), None)
        held = self._held.get(allocation)
        if job is None and held is None:
            return None
        number = job.job if job is not None else held.job if held is not None else 0
        state, reason = await self._watch.settled(number)
        if held is None:
            assert job is not None
            self._adopt(allocation, job)
            held = self._held[allocation]
        known = reasons.allocation_state(state)
        return msgspec.structs.replace(
            held.allocation,
            state="ended" if known == "pending" else known,  # it ran, and Slurm put it back into the queue
            end_reason=reasons.end_reason(state),
            detail=reasons.why_ended(number, state, reason),
        )

    # taking -------------------------------------------------------------------------------------------------
    async def acquire(
        self, allocation: AllocationId, node: NodeId, resources: Resources, lease_class: LeaseClass
    ) -> Allocation:
        """A job that runs, with its agent connected; or room in one that does already."""
        if job_of(node) is not None:
            return self._pools.acquire(allocation, node, resources)
        known = self._held.get(allocation)
        if known is not None:
            return known.allocation
        task = self._acquiring.get(allocation)
        if task is None:
            taking = self._take(allocation, node, resources, lease_class)
            task = asyncio.create_task(taking, name=f"platforms.slurm.acquire {allocation}")
            self._acquiring[allocation] = task
            task.add_done_callback(lambda _: self._acquiring.pop(allocation, None))
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            raise SiteUnavailableError(f"allocation {allocation} was given back before it began") from None
        except SiteUnavailableError as error:  # our callers know no finer kinds of it
            raise SiteUnavailableError(str(error)) from error

    async def _take(
        self, allocation: AllocationId, node: NodeId, resources: Resources, lease_class: LeaseClass
    ) -> Allocation:
        if lease_class is LeaseClass.HARVESTED:
            raise NoCapacityError("harvested leases cannot be had from Slurm yet; ask for elastic")
        self._pools.note_cold(resources, lease_class)
        began_s = time.time()
        program = self._program(allocation, node, resources)
        request = JobRequest(
            site=self._site, allocation=allocation, node=node, resources=resources, lease_class=lease_class,
            program=program, licenses=await self._counted(resources),
        )  # fmt: skip
        try:
            job = await self._allocate(request)
        except BaseException:
            await asyncio.shield(self._cancel_named(allocation))
            raise
        taken = Allocation(
            allocation=allocation, node=node, state="running", resources=resources,
            closes_s=self._closes_s(began_s + self._settings.time_limit_s), holds=_held(request.licenses),
        )  # fmt: skip
        self._held[allocation] = _Held(job, taken, time.monotonic())
        try:
            await self._start_agent(job, request)
        except BaseException:
            await asyncio.shield(self._release_quietly(allocation))
            raise
        return taken

    async def _counted(self, resources: Resources) -> dict[str, int]:
        """The licences that Slurm knows; it refuses a job that asks for others."""
        if not resources.licenses:
            return {}
        known = {row.name for row in (await self._watch.licenses()).rows}
        return {name: count for name, count in resources.licenses.items() if name in known}

    async def _allocate(self, request: JobRequest) -> int:
        """The number of a job that runs. Raises NoCapacityError, SiteUnavailableError."""
        pending_s = self._settings.pending_s
        taking = asyncio.create_task(
            self._client.take(request), name=f"platforms.slurm.take {request.allocation}"
        )
        try:
            done, _ = await asyncio.wait({taking}, timeout=pending_s)
            if done:
                return taking.result()
            why = f"it waited {pending_s:g} s in Slurm's queue: {await self._why_pending(request.allocation)}"
        except RefusedError as error:
            why = str(error)
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)
        raise NoCapacityError(f"{await self._describe(request.node)}: {why}")

    async def _why_pending(self, allocation: AllocationId) -> str:
        reading = await self._watch.jobs(time.monotonic())
        mine = [job for job in reading.rows if allocation_of(job, self._site) == allocation]
        return reasons.why_pending(mine[0].reason if mine else "None")

    async def _describe(self, node: NodeId) -> str:
        """What a node has free, for a refusal."""
        reading = await self._watch.nodes(time.monotonic())
        use = next((use for use in reading.rows if use.node == node), None)
        if use is None:
            return f"Slurm shows no node {node!r} to us"
        free = format_bytes(use.memory_bytes - use.memory_held_bytes)
        return f"node {node} ({use.state}) has {use.cores - use.cores_held} cores and {free} free"

    def _closes_s(self, ends_s: float) -> float:
        return ends_s - self._settings.close_s

    # the agent ----------------------------------------------------------------------------------------------
    async def _start_agent(self, job: int, request: JobRequest) -> None:
        """Until it has dialled in. Raises SiteUnavailableError when it does not."""
        step = asyncio.create_task(self._keep_step(job, request), name=f"platforms.slurm.step {job}")
        self._steps[request.allocation] = step
        arrival = asyncio.ensure_future(self._joined(NodeId(request.allocation)))
        try:
            done, _ = await asyncio.wait(
                {step, arrival}, timeout=self._settings.agent_start_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            arrival.cancel()
        if arrival in done:
            return
        failure = f"did not dial {self._agent_url} within {self._settings.agent_start_s:g} s"
        if step in done:
            failure = f"ended before it dialled the site: {step.result()}"
        raise SiteUnavailableError(
            f"the agent of Slurm job {job} on {request.node} {failure}; see {self._log_path}"
        )

    async def _keep_step(self, job: int, request: JobRequest) -> str:
        """Run the agent's step until its end, and say how that came; a start that fails is repeated.

        Cancelled, it leaves the step running.
        """
        end = ""
        for _ in range(STEP_TRIES):
            try:
                started = await self._client.start(job, request)
                code = await started.wait()
            except SiteUnavailableError as error:
                _log.error("the agent's step cannot be started or watched", job=job, why=str(error))
                return str(error)
            _log.info("agent's step ended", job=job, allocation=request.allocation, code=code)
            end = f"its step has exit code {code}"
            if request.allocation not in self._held or code == 0:
                return end
            await asyncio.sleep(STEP_PAUSE_S)
        return f"{end}, {STEP_TRIES} times in a row"

    def _program(self, allocation: AllocationId, node: NodeId, resources: Resources) -> Program:
        """The agent, with a state directory of its own: several nodes may share a file system."""
        settings = msgspec.structs.replace(
            self._node_settings, cores=resources.cores, memory=f"{resources.memory_bytes}",
            bandwidth=str(resources.bandwidth or ""), cache=str(resources.cache or ""),
        )  # fmt: skip
        words = (
            *agent_words(self._settings.python, self._agent_url),
            "--node", node, "--name", allocation, "--state", str(self._agents / allocation),
        )  # fmt: skip
        return Program(words=words, environ=secrets(self._join_key, allocation, settings), log=self._log_path)

    # giving back --------------------------------------------------------------------------------------------
    async def release(self, allocation: AllocationId) -> None:
        """Cancel its job, if it has one of its own. Raises SiteUnavailableError: then it is ours still."""
        if self._pools.release(allocation):
            return
        taking = self._acquiring.get(allocation)
        if taking is not None:
            taking.cancel()
        await self._give_back(allocation)

    async def _give_back(self, allocation: AllocationId) -> None:
        held = self._held.get(allocation) or await self._found(allocation)
        if held is None:
            await self._cancel_named(allocation)
        else:
            await self._client.cancel(held.job)
            self._held.pop(allocation, None)
            cleaning = asyncio.create_task(
                self._clean(allocation, held.job), name=f"platforms.slurm.clean {held.job}"
            )
            self._cleaning.add(cleaning)
            cleaning.add_done_callback(self._cleaning.discard)

    async def _found(self, allocation: AllocationId) -> _Held | None:
        """A job of ours that no survey has told of yet, because this site has just come back."""
        try:
            reading = await self._watch.jobs()
        except SiteUnavailableError:
            return None
        for job in reading.rows:
            is_running = reasons.allocation_state(job.state) == "running"
            if is_running and allocation_of(job, self._site) == allocation:
                self._adopt(allocation, job)
        return self._held.get(allocation)

    async def _clean(self, allocation: AllocationId, job: int) -> None:
        """Once Slurm has ended all that ran in it, remove what its agent wrote."""
        step = self._steps.pop(allocation, None)
        try:
            if not await gone(self._client, job, self._settings.command_timeout_s):
                _log.warning("a cancelled job has not ended yet", job=job)
            elif step is not None:
                await asyncio.wait({step}, timeout=self._settings.command_timeout_s)
        except SiteUnavailableError as error:
            _log.warning("whether a cancelled job has ended is not known", job=job, why=str(error))
        finally:
            if step is not None:
                step.cancel()
            await self._dismiss(NodeId(allocation))
            await self._remove(allocation)

    async def _remove(self, allocation: AllocationId) -> None:
        try:
            await self._client.remove(str(self._agents / allocation))
        except SiteUnavailableError as error:
            _log.warning("what an agent wrote is still there", allocation=allocation, why=str(error))

    async def _release_quietly(self, allocation: AllocationId) -> None:
        try:
            await self._give_back(allocation)
        except SiteUnavailableError as error:
            _log.error(
                "a job could not be cancelled; a later survey tries again",
                allocation=allocation,
                why=str(error),
            )

    async def _cancel_named(self, allocation: AllocationId) -> None:
        try:
            await self._client.cancel_named(allocation)
        except SiteUnavailableError as error:
            _log.warning(
                "a job may be left; a later survey tries again", allocation=allocation, why=str(error)
            )

    def _is_ours(self, job: Job) -> bool:
        return allocation_of(job, self._site) is not None


def _held(licenses: Mapping[str, int]) -> dict[str, HeldBy]:
    return dict.fromkeys(kinds.amounts(licenses), "slurm")


def _fewer(stock: Stock, named: Stock | None) -> Stock:
    """Slurm's, or this site's part of them as the settings name it."""
    if named is None or named.total >= stock.total:
        return stock
    return Stock(total=named.total, others=max(0, stock.others - (stock.total - named.total)))
