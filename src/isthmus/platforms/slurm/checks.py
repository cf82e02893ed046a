"""What is needed to draw leases from Slurm on this machine: is it there, and what does its lack cost?

Not here: how the answers are shown (`isthmus.cli.doctors`).
"""

import getpass
import shutil
from collections.abc import Awaitable, Callable
from typing import Literal

from isthmus.core.errors import SiteUnavailableError
from isthmus.core.model import Record
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm import parsing, reasons
from isthmus.platforms.slurm.running import Running
from isthmus.platforms.slurm.watching import Watch

COMMANDS = ("salloc", "srun", "squeue", "sinfo", "scancel", "scontrol")


class Check(Record, frozen=True):
    """`bad`: nothing works without it; `poor`: it works, at a cost."""

    subject: str
    verdict: Literal["good", "poor", "bad"]
    words: str


async def examine(settings: SlurmSettings, running: Running) -> list[Check]:
    """All checks, in an order in which the first bad one is the cause of those after it."""
    checks = [_commands()]
    if checks[0].verdict == "bad":
        return checks
    wanted = (_authentication, _controller, _partitions, _nodes, _cgroup)
    return [*checks, *[await _guarded(check, settings, running) for check in wanted]]


async def _guarded(
    check: Callable[[SlurmSettings, Running], Awaitable[Check]], settings: SlurmSettings, running: Running
) -> Check:
    try:
        return await check(settings, running)
    except SiteUnavailableError as error:
        return Check(subject=check.__name__.strip("_"), verdict="bad", words=f"{error}; no leases can be had")


def _commands() -> Check:
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        words = f"{', '.join(missing)} not on PATH; install slurm-client or go to a login node"
        return Check(subject="commands", verdict="bad", words=words)
    return Check(subject="commands", verdict="good", words=f"{', '.join(COMMANDS)} are here")


async def _authentication(settings: SlurmSettings, running: Running) -> Check:
    config = await running.run(("scontrol", "show", "config"), settings.command_timeout_s)
    kind = _value(config, "AuthType")
    return Check(subject="authentication", verdict="good", words=f"requests are accepted ({kind})")


async def _controller(settings: SlurmSettings, running: Running) -> Check:
    said = await running.run(("scontrol", "ping"), settings.command_timeout_s)
    verdict: Literal["good", "bad"] = "good" if " UP" in said else "bad"
    return Check(subject="controller", verdict=verdict, words=said.strip().splitlines()[0])


async def _partitions(settings: SlurmSettings, running: Running) -> Check:
    said = await running.run(("sinfo", "--noheader", "--format=%R"), settings.command_timeout_s)
    known = set(said.split())
    missing = {settings.partition, settings.elastic_partition} - known - {""}
    if missing:
        words = f"no partition {', '.join(sorted(missing))}; there are {', '.join(sorted(known))}"
        return Check(subject="partitions", verdict="bad", words=words)
    if not settings.elastic_partition and not settings.elastic_qos:
        words = "slurm.elastic_partition is not set: batch jobs cannot preempt elastic leases"
        return Check(subject="partitions", verdict="poor", words=words)
    return Check(subject="partitions", verdict="good", words=", ".join(sorted(known)))


async def _nodes(settings: SlurmSettings, running: Running) -> Check:
    uses = (await Watch(settings, running, getpass.getuser()).nodes()).rows
    usable = [use for use in uses if use.state in reasons.USABLE_NODES]
    gpus = sum(use.gpus for use in uses)
    words = f"{len(usable)} of {len(uses)} nodes usable, {gpus} GPUs"
    if not usable:
        return Check(subject="nodes", verdict="bad", words=f"{words}: no leases can be had")
    if not gpus:
        words += "; Slurm counts none (GRES), so functions cannot ask for any"
    return Check(subject="nodes", verdict="good" if gpus else "poor", words=words)


async def _cgroup(settings: SlurmSettings, running: Running) -> Check:
    config = await running.run(("scontrol", "show", "config"), settings.command_timeout_s)
    plugins = f"{_value(config, 'TaskPlugin')}, {_value(config, 'ProctrackType')}"
    if "cgroup" in plugins:
        return Check(subject="cgroup", verdict="good", words=f"Slurm confines jobs ({plugins})")
    words = f"Slurm does not confine jobs ({plugins}): what holds a lease is only what its agent can enforce"
    return Check(subject="cgroup", verdict="poor", words=words)


def _value(config: str, key: str) -> str:
    """Of a line `Key   = value` of `scontrol show config`. Raises SlurmOutputError."""
    for line in config.splitlines():
        name, separator, value = line.partition("=")
        if separator and name.strip() == key:
            return value.strip()
    raise parsing.SlurmOutputError(f"scontrol shows no {key}")
