"""Batch jobs of our user whose scripts say `#ISTHMUS lend`: start an agent in each, beside its own work.

The script runs as it is: the agent is a step of its own (`srun --overlap`), which Slurm ends with the job.
Slurm tells a job's script to its own user, so nobody need be asked, and `sbatch` is typed as ever.
Each job is looked at once, and again where Slurm did not answer.
Not here: what an agent lends (`isthmus.node.harvesting`).
"""

import asyncio
import re
import shlex
from collections.abc import Awaitable, Callable, Iterable

import structlog

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import NodeId
from isthmus.core.model import Record
from isthmus.core.settings import NodeSettings
from isthmus.node.launching import agent_words, job_holder, lent_name, secrets
from isthmus.node.lending import DIRECTORY_PREFIX
from isthmus.node.owners import LENT
from isthmus.platforms.slurm.client import JobSteps
from isthmus.platforms.slurm.directives import DirectiveError, Lend, lend_of
from isthmus.platforms.slurm.records import BatchJob, Job, Program

LOOKS_MAX = 2  # scripts asked for at once: many jobs may begin together
RETURN_S = 5.0  # an agent of an earlier site has dialled again by then
AGAIN_S = 10.0  # until a job is looked at again that could not be
STEP_TRIES = 3
STEP_PAUSE_S = 1.0
_log = structlog.get_logger("platforms.slurm")


class LenderAgents(Record, frozen=True):
    """
    url     where agents dial
    log     file for their words before they have one of their own
    python  empty: the interpreter that runs the site
    """

    url: str
    log: str
    python: str
    join_key: bytes
    node_settings: NodeSettings

    def program(self, job: BatchJob, lend: Lend) -> Program:
        """Shell, because a step knows its node only when it runs. What srun does not tell a step is told."""
        known = {
            "SLURM_JOB_NAME": job.name, "SLURM_JOB_ACCOUNT": job.account, "SLURM_JOB_QOS": job.qos,
            "SLURM_MEM_PER_NODE": f"{job.memory_bytes // job.nodes // 2**20}",
        }  # fmt: skip
        exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in known.items())
        words = agent_words(self.python, self.url)
        lent = ("--lend-cores", lend.cores, "--lend-memory", lend.memory)
        name = lent_name('"$SLURMD_NODENAME"', f"{job.job}")
        state = f'"${{TMPDIR:-/tmp}}/{DIRECTORY_PREFIX}{job.job}-$SLURMD_NODENAME"'
        run = f"{shlex.join(words)} --node {name} --state {state} {shlex.join(lent)}"
        environ = {LENT: "1", **secrets(self.join_key, job_holder(f"{job.job}"), self.node_settings)}
        return Program(words=("sh", "-c", f"export {exports}; exec {run}"), environ=environ, log=self.log)


class Lenders:
    """joined: returns when the agent of this name has dialled in."""

    def __init__(
        self, steps: JobSteps, agents: LenderAgents, joined: Callable[[NodeId], Awaitable[None]]
    ) -> None:
        self._steps = steps
        self._agents = agents
        self._joined = joined
        self._slots = asyncio.Semaphore(LOOKS_MAX)
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def see(self, running: Iterable[Job]) -> None:
        """Jobs that run now and are none of isthmus' own."""
        jobs = {job.job: job for job in running}
        for number in self._tasks.keys() - jobs.keys():
            self._tasks.pop(number).cancel()
        for number in jobs.keys() - self._tasks.keys():
            self._tasks[number] = asyncio.create_task(
                self._look(jobs[number]), name=f"platforms.slurm.lender {number}"
            )

    async def close(self) -> None:
        """Agents stay as long as their jobs; the site that comes back finds them."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    async def _look(self, job: Job) -> None:
        try:
            async with self._slots:
                lend = lend_of(await self._steps.script(job.job))
            if lend is not None and not await self._has_agent(job):
                await self._keep(job, lend)
        except DirectiveError as error:
            _log.warning("a job's script cannot be understood; it lends nothing", job=job.job, why=str(error))
        except SiteUnavailableError as error:
            _log.warning("a job may lend, but cannot be looked at now", job=job.job, why=str(error))
            await asyncio.sleep(AGAIN_S)
            self._tasks.pop(job.job, None)  # the next survey that still shows it has it looked at again

    async def _has_agent(self, job: Job) -> bool:
        try:
            async with asyncio.timeout(RETURN_S):
                await self._joined(NodeId(lent_name(_first(job.node), f"{job.job}")))
        except TimeoutError:
            return False
        return True

    async def _keep(self, job: Job, lend: Lend) -> None:
        described = await self._steps.describe(job.job)
        for _ in range(STEP_TRIES):
            _log.info("a job lends what it leaves idle", job=job.job, cores=lend.cores, memory=lend.memory)
            step = await self._steps.join(described, self._agents.program(described, lend))
            code = await step.wait()
            _log.info("the agent in a job that lends has ended", job=job.job, code=code)
            if code == 0:
                return
            await asyncio.sleep(STEP_PAUSE_S)


def _first(nodes: str) -> str:
    """`gpu[003-7,9]` -> `gpu003`"""
    found = re.match(r"([^\[,]*)(?:\[(\d*))?", nodes)
    return "".join(found.groups("")) if found else nodes
