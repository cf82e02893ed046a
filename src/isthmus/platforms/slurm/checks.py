"""What is needed to draw leases from Slurm from here: is it there, and what does its lack cost?

Not here: how the answers are shown (`isthmus.cli.doctors`).
"""

import shutil
import time
from collections.abc import Awaitable, Callable
from typing import Literal

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.model import Record
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm import reasons
from isthmus.platforms.slurm.client import SlurmClient

CLOCK_S_MAX = 5.0
COMMANDS = ("salloc", "srun", "squeue", "sinfo", "scancel", "scontrol")


class Check(Record, frozen=True):
    """`bad`: nothing works without it; `poor`: it works, at a cost."""

    subject: str
    verdict: Literal["good", "poor", "bad"]
    words: str


async def examine(settings: SlurmSettings, client: SlurmClient) -> list[Check]:
    """All checks, in an order in which the first bad one is the cause of those after it."""
    checks = [] if settings.ssh.host or settings.rest.url else [_commands()]
    if any(check.verdict == "bad" for check in checks):
        return checks
    wanted = (_controller, _authentication, _clock, _partitions, _nodes, _cgroup)
    return [*checks, *[await _guarded(check, settings, client) for check in wanted]]


async def _guarded(
    check: Callable[[SlurmSettings, SlurmClient], Awaitable[Check]],
    settings: SlurmSettings,
    client: SlurmClient,
) -> Check:
    try:
        return await check(settings, client)
    except SiteUnavailableError as error:
        return Check(subject=check.__name__.strip("_"), verdict="bad", words=f"{error}; no leases can be had")


def _commands() -> Check:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        words = (
            f"{', '.join(missing)} not on PATH; install slurm-client, go to a login node, or set "
            "slurm.ssh.host or slurm.rest.url"
        )
        return Check(subject="commands", verdict="bad", words=words)
    return Check(subject="commands", verdict="good", words=f"{', '.join(COMMANDS)} are here")


async def _controller(settings: SlurmSettings, client: SlurmClient) -> Check:
    said = await client.ping()
    verdict: Literal["good", "bad"] = "good" if " UP" in said else "bad"
    return Check(subject="controller", verdict=verdict, words=f"{said.splitlines()[0]} ({client.place})")


async def _authentication(settings: SlurmSettings, client: SlurmClient) -> Check:
    kind = (await client.configuration()).get("AuthType", "JWT")
    await client.jobs()
    return Check(subject="authentication", verdict="good", words=f"requests are accepted ({kind})")


async def _clock(settings: SlurmSettings, client: SlurmClient) -> Check:
    ahead_s = await client.clock_s() - time.time()
    if abs(ahead_s) > CLOCK_S_MAX:
        way = "ahead of" if ahead_s > 0 else "behind"
        words = (
            f"slurmctld's clock is {abs(ahead_s):.0f} s {way} this one; leases allow for it, but times in "
            "logs and bills do not agree"
        )
        return Check(subject="clock", verdict="poor", words=words)
    return Check(subject="clock", verdict="good", words="slurmctld's clock agrees with this one")


async def _partitions(settings: SlurmSettings, client: SlurmClient) -> Check:
    known = await client.partitions()
    pools = {pool.partition for pool in settings.pools.values()}
    missing = {settings.partition, settings.elastic_partition, *pools} - known - {""}
    if missing:
        words = f"no partition {', '.join(sorted(missing))}; there are {', '.join(sorted(known))}"
        return Check(subject="partitions", verdict="bad", words=words)
    if not settings.elastic_partition and not settings.elastic_qos:
        words = "slurm.elastic_partition is not set: batch jobs cannot preempt elastic leases"
        return Check(subject="partitions", verdict="poor", words=words)
    return Check(subject="partitions", verdict="good", words=", ".join(sorted(known)))


async def _nodes(settings: SlurmSettings, client: SlurmClient) -> Check:
    uses = await client.nodes()
    usable = [use for use in uses if use.state in reasons.USABLE_NODES]
    gpus = sum(use.gpus for use in uses)
    words = f"{len(usable)} of {len(uses)} nodes usable, {gpus} GPUs"
    if not usable:
        return Check(subject="nodes", verdict="bad", words=f"{words}: no leases can be had")
    if not gpus:
        words += "; Slurm counts none (GRES), so functions cannot ask for any"
    return Check(subject="nodes", verdict="good" if gpus else "poor", words=words)


async def _cgroup(settings: SlurmSettings, client: SlurmClient) -> Check:
    config = await client.configuration()
    if not config:
        words = "slurmrestd does not tell whether Slurm confines jobs; ask `scontrol show config`"
        return Check(subject="cgroup", verdict="poor", words=words)
    plugins = ", ".join(config.get(key, f"no {key}") for key in ("TaskPlugin", "ProctrackType"))
    if "cgroup" in plugins:
        return Check(subject="cgroup", verdict="good", words=f"Slurm confines jobs ({plugins})")
    words = f"Slurm does not confine jobs ({plugins}): what holds a lease is only what its agent can enforce"
    return Check(subject="cgroup", verdict="poor", words=words)
