"""Pure decisions: rules from a TOML file, a snapshot, a demand in; grant, wait or deny with reasons out."""

from isthmus.policy.advice import advice
from isthmus.policy.decide import Decision, Fired, decide, priority
from isthmus.policy.explain import in_words
from isthmus.policy.loading import examine, load_policies
from isthmus.policy.replay import Change, Logged, Replay
from isthmus.policy.rules import ALLOW_ALL, PolicySet
from isthmus.policy.snapshot import Demand, Snapshot, SnapshotRecord
from isthmus.policy.weighing import Candidate

__all__ = [
    "ALLOW_ALL",
    "Candidate",
    "Change",
    "Decision",
    "Demand",
    "Fired",
    "Logged",
    "PolicySet",
    "Replay",
    "Snapshot",
    "SnapshotRecord",
    "advice",
    "decide",
    "examine",
    "in_words",
    "load_policies",
    "priority",
]
