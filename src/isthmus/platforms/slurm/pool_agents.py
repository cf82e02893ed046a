"""How the agent of a pool's job is started, and where it keeps its state.

Its name has the node and the job in it, which only the job itself knows: so its script is a line of shell.
"""

import os
import shlex
from collections.abc import Mapping

import msgspec

from isthmus.core.ids import NodeId
from isthmus.core.model import Record
from isthmus.core.settings import NodeSettings, SlurmPoolSettings
from isthmus.node.launching import agent_words, pool_holder, pooled_job, pooled_name, secrets
from isthmus.platforms.slurm.records import PoolRequest

AGENT_TRIES = 4  # starts of it in one job: a later one adopts what the one before left running

_KEEP = """\
trap 'gone=1' TERM; gone=; mkdir -p {directory} {logs}
for n in {tries}; do
  (trap '' TERM; exec {run}) & agent=$!
  [ "$gone" ] || wait $agent; code=$?
  if [ "$gone" ]; then
    while kill -TERM $agent 2>/dev/null; do sleep 0.2; done
    wait $agent; code=$?
  fi
  [ $code = 0 ] && exit
  sleep 0.5
done
exit 1
"""
"""Slurm signals the shell and the agent: the shell must outlive it, because when it ends the rest is killed.
An agent that just starts does not heed the signal, so it is told until it does. One that was killed is
followed by another even then: it ends what the first one left.
"""


class PoolAgents(Record, frozen=True):
    """
    site        the name of our site in jobs' comments
    url         where agents dial
    directory   of their states, as compute nodes see it; log: of what they say before they have one
    python      empty: the interpreter that runs the site
    """

    site: str
    url: str
    directory: str
    log: str
    python: str
    join_key: bytes
    node_settings: NodeSettings

    def request(self, pool: str, shape: SlurmPoolSettings) -> PoolRequest:
        return PoolRequest(
            site=self.site,
            pool=pool,
            shape=shape,
            script=self._script(pool),
            environ=self._environ(pool, shape),
        )

    def state(self, job: int) -> str:
        """The directory of this job's agent."""
        return f"{self.directory}/pool-{job}"

    def _script(self, pool: str) -> str:
        directory, log = shlex.quote(self.directory), shlex.quote(self.log)
        agent = shlex.join(agent_words(self.python, self.url))
        name = f'"{pooled_name("$SLURMD_NODENAME", pool, "$SLURM_JOB_ID")}"'
        state = f'{directory}/pool-"$SLURM_JOB_ID"'
        run = f"{agent} --node {name} --name {name} --state {state} >>{log} 2>&1"
        tries, logs = " ".join(map(str, range(AGENT_TRIES))), shlex.quote(os.path.dirname(self.log))
        return _KEEP.format(directory=directory, logs=logs, tries=tries, run=run)

    def _environ(self, pool: str, shape: SlurmPoolSettings) -> Mapping[str, str]:
        settings = msgspec.structs.replace(
            self.node_settings, cores=shape.cores, memory=shape.memory, bandwidth="", cache=""
        )
        return secrets(self.join_key, pool_holder(pool), settings)


def node_name(node: NodeId, pool: str, job: int) -> NodeId:
    """What an allocation of a pool is called as a node."""
    return NodeId(pooled_name(node, pool, f"{job}"))


def job_of(node: NodeId) -> int | None:
    """The job of a node that is an allocation of a pool; None: it is no such node."""
    job = pooled_job(node)
    return int(job) if job is not None else None
