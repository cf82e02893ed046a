"""How much of what a batch job lends and does not use may be harvested: `consent(...) -> Consent`.

    protect rules first: one that matches ends it.
    harvest rules then: all that match limit it; none that matches means all of it.

What is asked about is the total: what may be harvested of the job on one node, with what is harvested there
already.

Invariant: pure; the answer is at most the slack. Not here: measuring slack, and taking it (`isthmus.node`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import cel

from isthmus.core.model import Record
from isthmus.policy import variables
from isthmus.policy.rules import Harvest, PolicySet, Protect, Rule
from isthmus.policy.snapshot import Holding


class Job(Record, frozen=True):
    """A batch job that lends, as rules see it: what it lends on one node, and whose it is."""

    id: str
    name: str = ""
    user: str = ""
    account: str = ""
    partition: str = ""
    qos: str = ""
    cores: int = 0
    memory_bytes: int = 0


class Moment(NamedTuple):
    """What else rules may read."""

    clock_s: float
    signals: Mapping[str, float]


class Consent(NamedTuple):
    """What may be harvested in all, and why not more."""

    amount: Holding
    reason: str


NOTHING = Holding()


def consent(
    policies: PolicySet, job: Job, slack: Holding, harvested: Mapping[tuple[str, str], Holding], now: Moment
) -> Consent:
    """
    slack      what the job holds on one node and does not use itself, what is harvested of it included
    harvested  what is harvested elsewhere: by ("job", id), ("user", name) and ("partition", name)
    """
    context = cel.Context(variables=_shown(job, now))
    rules = [rule for rule in policies.on_jobs if rule.matches(context)]
    for rule in rules:
        if isinstance(rule.spec, Protect):
            return Consent(NOTHING, f"rule {rule.name!r} protects it" + _said(rule))
    amount, reason = slack, "its owner lends what it does not use"
    for rule in rules:
        limited = _limited(rule.spec, job, slack, harvested)
        lower = _least(amount, limited)
        if lower != amount:
            amount, reason = lower, f"rule {rule.name!r} limits it" + _said(rule)
    return Consent(amount, reason)


def _shown(job: Job, now: Moment) -> dict[str, Any]:
    shown = {field: getattr(job, field) for field in job.__struct_fields__}
    shown["memory"] = shown.pop("memory_bytes")
    return {"job": shown, "clock": variables.of_clock(now.clock_s), "signal": dict(now.signals)}


def _limited(spec: object, job: Job, slack: Holding, harvested: Mapping[tuple[str, str], Holding]) -> Holding:
    """What one rule leaves of the slack."""
    assert isinstance(spec, Harvest)
    whose = {"job": job.id, "user": job.user, "partition": job.partition}[spec.per]
    others = harvested.get((spec.per, whose), NOTHING)
    return Holding(
        cores=_share(slack.cores, spec.share, spec.cores, others.cores),
        memory_bytes=_share(slack.memory_bytes, spec.share, spec.memory_bytes, others.memory_bytes),
        gpus=_share(slack.gpus, spec.share, spec.gpus, others.gpus),
    )


def _share(slack: int, share: float, cap: int, others: int) -> int:
    """Part of the slack, within what others leave of a cap (0: none)."""
    part = int(slack * share)
    return max(min(part, cap - others), 0) if cap else part


def _least(one: Holding, other: Holding) -> Holding:
    return Holding(
        cores=min(one.cores, other.cores),
        memory_bytes=min(one.memory_bytes, other.memory_bytes),
        gpus=min(one.gpus, other.gpus),
    )


def _said(rule: Rule) -> str:
    return f": {rule.spec.message}" if rule.spec.message else ""
