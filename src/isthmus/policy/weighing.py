"""Weigh the nodes that have room for a request: packing, `prefer` rules, and rules that deny nodes.

How a decision over ten thousand nodes and fifty rules stays below a millisecond:

1. Nodes are filtered in columns, and scored by shelf: those that packing cannot tell apart (`shelves.py`).
2. Rules that read only what nodes of one shape share (labels, platform, totals) are evaluated once per shape,
   for at most SHAPES_MAX shapes of the fitting nodes; what they said is remembered for requests that look
   the same to them. Beyond that many shapes, only those of the best nodes are looked at: a `prefer` may then
   miss a node that packs worse, a `deny` is never missed.
3. Rules that read what differs from node to node (its name, what is free) are evaluated only for the
   CANDIDATES_MAX best nodes; all of them denied, the next best follow, until the request is served or no node
   is left.

Invariant: pure; what is remembered changes no answer. Not here: rules on the request (`decide.py`).
"""

import functools
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import cel
import msgspec
import numpy as np

from isthmus.core.ids import NodeId
from isthmus.core.model import Record
from isthmus.policy import placement, variables
from isthmus.policy.conditions import STATIC_NODE_FIELDS
from isthmus.policy.placement import BoolArray, FloatArray, Ranking
from isthmus.policy.rules import Deny, PolicySet, Prefer, Rule
from isthmus.policy.snapshot import Demand, Shape, Snapshot

CANDIDATES_MAX = 8  # nodes weighed one by one, and kept in the log
SHAPES_MAX = 16
REMEMBERED_MAX = 4096  # judgements of shapes, then forgotten at once

Judgement = tuple[float, str]  # what `prefer` rules add, and the rule that denies it ("" for none)


class Candidate(Record, frozen=True):
    """A node that was weighed. `score`: packing (-1..1) plus `prefer` rules; `denied_by`: a rule's name."""

    node: NodeId
    score: float
    slots: int = 0
    denied_by: str = ""


class Weighed(NamedTuple):
    """`candidates`: best first, enough of them to serve the request if that is possible; `fitting`: nodes
    that have room for at least one lease.
    """

    candidates: tuple[Candidate, ...]
    fitting: int


class Weighing:
    """
    context      what conditions read; `node` is whichever is being judged
    verdicts     allow and deny rules on nodes, in order
    preferences  prefer rules on nodes
    refusal      the deny rule that holds for nodes that no verdict settles, if there is one
    bonus        what prefer rules that do not look at nodes add
    """

    def __init__(self, policies: PolicySet, snapshot: Snapshot, demand: Demand, level: float) -> None:
        self._policies = policies
        self._nodes = snapshot.nodes
        self._resources = demand.lease.resources
        self._need = placement.need_of(self._resources)
        self._shown = variables.of_request(snapshot, demand, level, policies.reads)
        self.context = cel.Context(variables=self._shown)
        self.verdicts: list[Rule] = []
        self.preferences: list[Rule] = []
        self.refusal: Deny | None = None
        self.bonus = 0.0
        self._own: tuple[Rule, ...] = ()  # preferences that nodes of one shape do not share

    def weigh(self, fitting: BoolArray, wanted: int) -> Weighed:
        """The best of the nodes that fit: enough for `wanted` leases, at least one batch.

        fitting   (nodes,)
        """
        self._own = tuple(rule for rule in self.preferences if not rule.per_shape)
        ranking = Ranking(self._nodes, fitting, self._resources)
        if not ranking.count:
            return Weighed((), 0)
        bonus, denial = self._judge_shapes(ranking)
        scores = ranking.scores + bonus[ranking.shapes]
        order = self._last_where_denied(scores, ranking, denial)
        weighed: list[Candidate] = []
        room = 0
        nodes = ranking.ordered(order)
        while batch := list(itertools.islice(nodes, CANDIDATES_MAX)):
            judged = [self._judge(row, float(scores[shelf]), denial) for row, shelf in batch]
            weighed += sorted(judged, key=lambda candidate: -candidate.score)
            room += sum(candidate.slots for candidate in judged if not candidate.denied_by)
            if room >= wanted or not np.isfinite(order[batch[-1][1]]):
                break
        return Weighed(tuple(weighed), ranking.count)

    def may_use(self, row: int) -> bool:
        """Whether rules let the request onto a node."""
        if not self.verdicts:
            return True
        self._set_node(row, self._policies.reads["node"])
        return not self._verdict()

    def _judge_shapes(self, ranking: Ranking) -> tuple[FloatArray, dict[int, str]]:
        """Bonus by shape, and the rule that denies a shape ("" for none). A shape that is missing there is
        judged node by node, if there is a verdict on nodes at all."""
        known = self._nodes.shapes
        bonus = np.zeros(len(known))
        preferences = [rule for rule in self.preferences if rule.per_shape]
        are_shared = all(rule.per_shape for rule in self.verdicts)
        if not self.verdicts and not preferences:
            return bonus, {}
        denial: dict[int, str] = {}
        asked = self._asked(are_shared)
        for shape in ranking.shapes_of_the_best(SHAPES_MAX):
            weight, denied_by = self._judge_shape(known[shape], preferences, are_shared, asked)
            bonus[shape] = weight
            if are_shared:
                denial[shape] = denied_by
        return bonus, denial

    def _asked(self, are_shared: bool) -> bytes:
        """All that a judgement of a shape depends on but the shape."""
        reads = self._policies.shape_reads
        shown = [
            {field: value for field, value in self._shown[root].items() if "" in fields or field in fields}
            for root, fields in reads.items()
            if root != "node"
        ]
        refusal = self.refusal.name if self.refusal is not None else ""
        verdicts = [rule.line for rule in self.verdicts] if are_shared else []
        return msgspec.msgpack.encode((shown, refusal, verdicts))

    def _judge_shape(
        self, shape: Shape, preferences: list[Rule], are_shared: bool, asked: bytes
    ) -> Judgement:
        shown = variables.of_shape(shape, self._policies.reads["node"] & STATIC_NODE_FIELDS)
        key = asked + msgspec.msgpack.encode(shown)
        remembered = self._policies.remembered
        judgement = remembered.get(key)
        if judgement is None:
            self.context.add_variable("node", shown)
            weight = sum(_weight(rule) for rule in preferences if rule.matches(self.context))
            judgement = weight, self._verdict() if are_shared else ""
            if len(remembered) >= REMEMBERED_MAX:
                remembered.clear()
            remembered[key] = judgement
        return judgement

    def _last_where_denied(self, scores: FloatArray, ranking: Ranking, denial: dict[int, str]) -> FloatArray:
        """Scores to order by: nodes of denied shapes come last, seen only when nothing else is there."""
        denied = [shape for shape, denied_by in denial.items() if denied_by]
        return np.where(np.isin(ranking.shapes, denied), -np.inf, scores) if denied else scores

    def _judge(self, row: int, score: float, denial: dict[int, str]) -> Candidate:
        """Weigh one node with the rules that its shape has not settled; `score` holds those that it has."""
        denied_by = denial.get(int(self._nodes.shape[row])) if self.verdicts else ""
        bonus = self.bonus
        if self._own or denied_by is None:
            self._set_node(row, _fields(self._own if denied_by is not None else (*self._own, *self.verdicts)))
            bonus += sum(_weight(rule) for rule in self._own if rule.matches(self.context))
            if denied_by is None:
                denied_by = self._verdict()
        return Candidate(
            node=self._nodes.ids[row],
            score=round(score + bonus, 6),
            slots=placement.slots(self._nodes, row, self._need),
            denied_by=denied_by,
        )

    def _verdict(self) -> str:
        """The name of the rule that denies the node now in the context, or nothing."""
        for rule in self.verdicts:
            if rule.matches(self.context):
                return rule.name if isinstance(rule.spec, Deny) else ""
        return self.refusal.name if self.refusal is not None else ""

    def _set_node(self, row: int, fields: frozenset[str]) -> None:
        """Show a node to the conditions that follow."""
        self.context.add_variable("node", variables.of_node(self._nodes, row, fields))


@functools.lru_cache(maxsize=256)
def _fields_of(reads: tuple[frozenset[str], ...]) -> frozenset[str]:
    return frozenset[str]().union(*reads)


def _fields(rules: Iterable[Rule]) -> frozenset[str]:
    """What these rules read of a node: showing one costs time by the field."""
    return _fields_of(tuple(rule.reads["node"] for rule in rules))


def _weight(rule: Rule) -> float:
    return rule.spec.weight if isinstance(rule.spec, Prefer) else 0.0
