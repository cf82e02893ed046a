"""Jobs that lend, seen by a site whose Slurm does not always answer."""

import asyncio

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.ids import NodeId
from isthmus.core.settings import NodeSettings
from isthmus.platforms.slurm import lenders
from isthmus.platforms.slurm.directives import Lend
from isthmus.platforms.slurm.lenders import LenderAgents, Lenders
from isthmus.platforms.slurm.records import BatchJob, Job

AGENTS = LenderAgents(
    url="ws://h:1/agent", log="/s/srun.log", python="/py", join_key=b"secret", node_settings=NodeSettings()
)
JOB = Job(
    job=42, node=NodeId("n7"), state="RUNNING", reason="None", cores=2, memory_bytes=2**30,
    ends_s=2e9, comment="",
)  # fmt: skip
DESCRIBED = BatchJob(job=42, name="cfd", account="phys", qos="night", nodes=2, memory_bytes=2**31)


class Steps:
    """Slurm, silent when it is first asked for the script. The agent ends as soon as it has begun."""

    def __init__(self):
        self.joined = []
        self.silences = 1

    async def script(self, job):
        if self.silences:
            self.silences -= 1
            raise SiteUnavailableError("scontrol did not answer")
        return "#!/bin/sh\n#ISTHMUS lend\n"

    async def describe(self, job):
        return DESCRIBED

    async def join(self, job, program):
        self.joined.append(program)
        return self

    async def wait(self):
        return 0


async def _absent(node):
    await asyncio.Event().wait()


def test_a_job_that_could_not_be_looked_at_lends_after_a_later_survey(monkeypatch):
    monkeypatch.setattr(lenders, "AGAIN_S", 0.01)
    monkeypatch.setattr(lenders, "RETURN_S", 0.01)

    async def story():
        steps = Steps()
        seen = Lenders(steps, AGENTS, _absent)
        while not steps.joined:
            seen.see([JOB])
            await asyncio.sleep(0.01)
        for _ in range(20):
            seen.see([JOB])
            await asyncio.sleep(0.01)
        await seen.close()
        return steps.joined

    assert len(asyncio.run(story())) == 1, "and once only"


def test_each_try_in_a_job_has_the_same_directory_on_its_node():
    words = AGENTS.program(DESCRIBED, Lend(line=2)).words
    assert words[:2] == ("sh", "-c")
    assert words[2].endswith(
        'exec /py -m isthmus.node.agent --site ws://h:1/agent --node "$SLURMD_NODENAME".job42 '
        '--state "${TMPDIR:-/tmp}/isthmus-lent-42-$SLURMD_NODENAME" --lend-cores auto --lend-memory auto'
    )
