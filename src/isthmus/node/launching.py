"""What an agent is told at its start: its name, where its site is, and what only its environment may hold."""

import re
import sys

import msgspec

from isthmus.core import tokens
from isthmus.core.ids import NodeId
from isthmus.core.settings import NodeSettings

_LENT = re.compile(r".+\.job(\d+)")
_POOLED = re.compile(r".+\.([a-z][a-z0-9-]*)\.(\d+)")


def agent_words(python: str, url: str) -> list[str]:
    """How its command begins. python: empty: the interpreter that runs us."""
    return [python or sys.executable, "-m", "isthmus.node.agent", "--site", url]


def lent_name(node: str, job: str) -> str:
    """Of what a batch job lends of one of its nodes, as a node."""
    return f"{node}.job{job}"


def pooled_name(node: str, pool: str, job: str) -> str:
    """Of an allocation of a pool, as a node."""
    return f"{node}.{pool}.{job}"


def pooled_job(name: str) -> str | None:
    """The job of a node that is an allocation of a pool; None: it is no such node."""
    found = _POOLED.fullmatch(name)
    return found[2] if found else None


def agent_url(site_url: str) -> str:
    """`http://HOST:PORT` -> `ws://HOST:PORT/agent`, where agents dial the site."""
    return site_url.replace("http", "ws", 1) + "/agent"


def rest_url(agent_url: str) -> str:
    """`ws://HOST:PORT/agent` -> `http://HOST:PORT`."""
    scheme, _, rest = agent_url.partition("://")
    return f"{'https' if scheme == 'wss' else 'http'}://{rest.removesuffix('/agent')}"


def key_holder(agent: NodeId) -> str:
    """Whose key the agent of this name holds: its own, or its pool's (`n7.warm.42` -> `pool:warm`), or its
    job's (`n7.job42` -> `job:42`): a name with node and job in it is made only when the key has been given.
    """
    pooled, lent = _POOLED.fullmatch(agent), _LENT.fullmatch(agent)
    if lent:
        return job_holder(lent[1])
    return pool_holder(pooled[1]) if pooled else agent


def pool_holder(pool: str) -> str:
    return f"pool:{pool}"


def job_holder(job: str) -> str:
    return f"job:{job}"


def secrets(join_key: bytes, holder: str, settings: NodeSettings) -> dict[str, str]:
    """By environment, never on the command line, which every user of the machine can read.

    holder  as `key_holder` says it of the agent's name
    """
    return {
        "ISTHMUS_AGENT_KEY": tokens.agent_key(join_key, holder).hex(),
        "ISTHMUS_AGENT_SETTINGS": msgspec.json.encode(settings).decode(),
    }
