"""Score nodes for a request and lay its leases out on them.

The base score packs: a node scores higher the fuller it gets, so that large holes stay whole, and a node with
GPUs scores lower for a lease that needs none. `prefer` rules add their weight on top (`decide.py`).

Invariant: pure; arrays in, arrays out; equal scores are settled by the order of `snapshot.nodes`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from isthmus.core.ids import NodeId
from isthmus.core.model import Resources
from isthmus.policy.snapshot import IntArray, NodeTable

FloatArray = NDArray[np.float64]
GPU_WASTE = 1.0  # what a node with GPUs loses for a lease without: more than any packing gains


def slots(nodes: NodeTable, resources: Resources) -> IntArray:
    """How many leases of `resources` each node could take now: (nodes,), 0 where it is closed or full."""
    fitting = np.minimum(
        nodes.free_cores // resources.cores, nodes.free_memory_bytes // resources.memory_bytes
    )
    if resources.gpus:
        fitting = np.minimum(fitting, nodes.free_gpus // resources.gpus)
    return np.where(nodes.open, np.maximum(fitting, 0), 0)


def base_scores(nodes: NodeTable, rows: IntArray, resources: Resources) -> FloatArray:
    """Packing score of the given rows, in -1..1: the share of the node's cores in use with the lease."""
    left = (nodes.free_cores[rows] - resources.cores) / np.maximum(nodes.cores[rows], 1)
    scores = 1.0 - left
    if not resources.gpus:
        scores = scores - GPU_WASTE * (nodes.gpus[rows] > 0)
    return scores


def best_rows(rows: IntArray, scores: FloatArray, count: int) -> IntArray:
    """The `count` rows of highest score, best first; equal scores in order of the rows."""
    if len(rows) > count:
        threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
        above = np.flatnonzero(scores > threshold)
        at = np.flatnonzero(scores == threshold)[: count - len(above)]
        kept = np.sort(np.concatenate((above, at)))
        rows, scores = rows[kept], scores[kept]
    return rows[np.argsort(-scores, kind="stable")]


def lay_out(ids: Sequence[NodeId], free_slots: Sequence[int], count: int) -> list[NodeId]:
    """Up to `count` places, filling the best node first: leases of one request end up close to each other."""
    places: list[NodeId] = []
    for node, free in zip(ids, free_slots, strict=True):
        places.extend([node] * min(free, count - len(places)))
        if len(places) == count:
            break
    return places
