"""Nodes on shelves: those of one shape with equally many free cores stand on one shelf, because packing
cannot tell them apart. Ten thousand nodes stand on a few hundred shelves: these are scored and sorted.

Invariant: `of_node[i]` is the shelf of node `i`; a shelf that became empty is used again, so there are never
more shelves than nodes. Not here: scores (`placement.py`).
"""

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class Shelves:
    """
    of_node     (nodes,) the shelf of each node
    shape       (shelves,) what its nodes have in common, as an index into `NodeTable.shapes`
    free_cores  (shelves,)
    """

    def __init__(self, shape: IntArray, free_cores: IntArray) -> None:
        nodes = len(shape)
        lowest = int(free_cores.min()) if nodes else 0
        span = int(free_cores.max()) - lowest + 1 if nodes else 1
        keys, shelf, counts = np.unique(
            shape * span + (free_cores - lowest), return_inverse=True, return_counts=True
        )
        self.of_node: IntArray = shelf.astype(np.int64)
        self.shape: IntArray = np.zeros(nodes, dtype=np.int64)
        self.free_cores: IntArray = np.zeros(nodes, dtype=np.int64)
        self.shape[: len(keys)] = keys // span
        self.free_cores[: len(keys)] = keys % span + lowest
        self._nodes = counts.tolist() + [0] * (nodes - len(keys))  # that stand on each shelf
        self._spare = list(range(nodes - 1, len(keys) - 1, -1))
        taken = zip(self.shape[: len(keys)].tolist(), self.free_cores[: len(keys)].tolist(), strict=True)
        self._shelves: dict[tuple[int, int], int] = {key: i for i, key in enumerate(taken)}

    def move(self, node: int, shape: int, free_cores: int) -> None:
        """The node has so many free cores now."""
        before = int(self.of_node[node])
        self._nodes[before] -= 1
        if not self._nodes[before]:
            del self._shelves[int(self.shape[before]), int(self.free_cores[before])]
            self._spare.append(before)
        self._put(node, (shape, free_cores))

    def _put(self, node: int, key: tuple[int, int]) -> None:
        shelf = self._shelves.get(key)
        if shelf is None:
            shelf = self._shelves[key] = self._spare.pop()
            self.shape[shelf], self.free_cores[shelf] = key
        self._nodes[shelf] += 1
        self.of_node[node] = shelf
