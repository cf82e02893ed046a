"""Score nodes for a request and lay its leases out on them.

The base score packs: a node scores higher the fuller it gets, so that large holes stay whole, and a node with
GPUs scores lower for a lease that needs none. `prefer` rules add their weight on top (`weighing.py`).

Invariant: pure; arrays in, arrays out; equal scores are settled by the order of `snapshot.nodes`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isthmus.core.ids import NodeId
from isthmus.core.kinds import of_node
from isthmus.core.model import LeaseClass, Resources
from isthmus.policy.shelves import IntArray
from isthmus.policy.snapshot import NodeTable

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Size = tuple[int, ...]  # cores, bytes of memory, GPUs, and of further kinds as in `Need.kinds`
GPU_WASTE = 1.0  # what a node with GPUs loses for a lease without: more than any packing gains
POOL_GAIN = 2.0  # what a node gains whose agent stands ready: more than the rest together
SHELVES_SORTED = 32  # at first; most requests need no more
HANDFUL = 16  # nodes looked up together
_NONE = np.int64(0)  # of a kind that no node has


class Need(NamedTuple):
    """What one lease takes of its node. kinds: the further ones, in the order of `size`."""

    size: Size
    kinds: tuple[str, ...]


def need_of(resources: Resources) -> Need:
    bound = of_node(resources.amounts)
    return Need((resources.cores, resources.memory_bytes, resources.gpus, *bound.values()), tuple(bound))


def hosts(nodes: NodeTable, lease_class: LeaseClass, resources: Resources) -> BoolArray:
    """Which nodes may take such leases: (nodes,).

    Lent ones take harvested leases, and no others. Pooled ones, which may be taken back, take elastic leases
    of what the node itself has: for licences a lease needs a job of its own.
    """
    if lease_class is LeaseClass.HARVESTED:
        return nodes.lent
    if lease_class is LeaseClass.RESERVED or resources.amounts:
        return ~nodes.lent & ~nodes.pooled
    return ~nodes.lent


def fits(nodes: NodeTable, resources: Resources) -> BoolArray:
    """Which nodes have room for at least one lease of `resources` now: (nodes,)."""
    fitting = nodes.open & (nodes.free_cores >= resources.cores)
    fitting &= nodes.free_memory_bytes >= resources.memory_bytes
    if resources.gpus:
        fitting &= nodes.free_gpus >= resources.gpus
    for kind, amount in of_node(resources.amounts).items():
        fitting &= nodes.free_of.get(kind, _NONE) >= amount
    return fitting


def slots(nodes: NodeTable, row: int, need: Need) -> int:
    """How many leases one node that fits could take now."""
    return min(have // want for have, want in zip(free(nodes, row, need), need.size, strict=True) if want)


def free(nodes: NodeTable, row: int, need: Need) -> Size:
    """What one node has left of all that is needed."""
    own = int(nodes.free_cores[row]), int(nodes.free_memory_bytes[row]), int(nodes.free_gpus[row])
    return *own, *(int(nodes.free_of[kind][row]) if kind in nodes.free_of else 0 for kind in need.kinds)


class Ranking:
    """The nodes that fit, by shelf.

    shelves  those with a node that fits;  scores: packing score of each, in -1..3;  shapes: of each
    """

    def __init__(self, nodes: NodeTable, fitting: BoolArray, resources: Resources) -> None:
        self._rows: IntArray = np.flatnonzero(fitting)
        self._shelf: IntArray = nodes.shelves.of_node[self._rows]
        counts = np.bincount(self._shelf, minlength=len(fitting))
        self.count = len(self._rows)
        self.shelves: IntArray = np.flatnonzero(counts)
        self._counts: IntArray = counts[self.shelves]
        self.shapes: IntArray = nodes.shelves.shape[self.shelves]
        self.scores = _base_scores(nodes, self.shapes, nodes.shelves.free_cores[self.shelves], resources)

    def shapes_of_the_best(self, limit: int) -> list[int]:
        """The shapes of all that fits, or of the best shelves if there are more than `limit`."""
        present = np.unique(self.shapes)
        if len(present) > limit:
            present = np.unique(self.shapes[best(self.scores, limit)])
        return [int(shape) for shape in present]

    def ordered(self, order: FloatArray) -> Iterator[tuple[int, int]]:
        """(row of the node table, position of its shelf here), highest `order` first; lazily, because a few
        are enough most of the time.

        order   (shelves,)
        """
        position = np.zeros(int(self.shelves[-1]) + 1, dtype=np.int64)
        position[self.shelves] = np.arange(len(self.shelves))
        at: IntArray = position[self._shelf]
        for shelves in self._handfuls(_groups(order)):
            chosen = np.full(len(order), False)
            chosen[shelves] = True
            members = np.flatnonzero(chosen[at])
            if order[shelves[0]] != order[shelves[-1]]:
                members = members[np.argsort(-order[at[members]], kind="stable")]
            for member in members:
                yield int(self._rows[member]), int(at[member])

    def _handfuls(self, groups: Iterator[IntArray]) -> Iterator[IntArray]:
        """Shelves of equal order, small ones taken together: each handful costs a look at all nodes."""
        small: list[IntArray] = []
        nodes = 0
        for group in groups:
            nodes_of_group = int(self._counts[group].sum())
            if small and (nodes >= HANDFUL or nodes_of_group > HANDFUL):
                yield np.concatenate(small)
                small, nodes = [], 0
            small.append(group)
            nodes += nodes_of_group
        if small:
            yield np.concatenate(small)


def _groups(order: FloatArray) -> Iterator[IntArray]:
    """Positions of equal order together, highest first: sorted as far as somebody asks."""
    first = best(order, SHELVES_SORTED)
    if len(order) > len(first):
        threshold = order[first[-1]]
        yield from _runs(order, first[order[first] > threshold])
        rest = np.flatnonzero(order <= threshold)
        first = rest[np.argsort(-order[rest], kind="stable")]
    yield from _runs(order, first)


def _runs(order: FloatArray, positions: IntArray) -> Iterator[IntArray]:
    """Sorted positions, split where the order changes."""
    if len(positions):
        sorted_order = order[positions]  # -inf among them: not to be subtracted
        yield from np.split(positions, np.flatnonzero(sorted_order[1:] != sorted_order[:-1]) + 1)


def best(scores: FloatArray, count: int) -> IntArray:
    """The positions of the `count` highest scores, best first; equal scores in order of position."""
    positions: IntArray = np.arange(len(scores))
    if len(scores) > count:
        threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
        above = np.flatnonzero(scores > threshold)
        at = np.flatnonzero(scores == threshold)[: count - len(above)]
        positions = np.sort(np.concatenate((above, at)))
    return positions[np.argsort(-scores[positions], kind="stable")]


def lay_out(ids: Sequence[NodeId], free_slots: Sequence[int], count: int) -> list[NodeId]:
    """Up to `count` places, filling the best node first: leases of one request end up close to each other."""
    places: list[NodeId] = []
    for node, free in zip(ids, free_slots, strict=True):
        places.extend([node] * min(free, count - len(places)))
        if len(places) == count:
            break
    return places


def _base_scores(
    nodes: NodeTable, shapes: IntArray, free_cores: IntArray, resources: Resources
) -> FloatArray:
    """The share of a node's cores that would be in use with the lease, less what a GPU is wasted."""
    left = (free_cores - resources.cores) / nodes.shape_cores[shapes]
    scores: FloatArray = 1.0 - left + POOL_GAIN * nodes.shape_is_pooled[shapes]
    if not resources.gpus:
        scores = scores - GPU_WASTE * nodes.shape_has_gpus[shapes]
    return scores
