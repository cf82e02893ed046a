"""Keep each pool's minimum warm: tell agents how many spare executors of which environment to hold ready.

Invariant: pure bookkeeping; an order is due only where what was told last differs from what is wanted now.
"""

from collections.abc import Mapping, Sequence

from isthmus.core.ids import EnvironmentId, NodeId
from isthmus.core.model import Environment
from isthmus.core.settings import PoolSettings
from isthmus.node.messages import Warm

ENVIRONMENTS_MAX = 8  # per pool, the latest used; each costs a zygote and its spares on every node


class Warming:
    def __init__(self, pools: Mapping[str, PoolSettings]) -> None:
        self._pools = {name: pool for name, pool in pools.items() if pool.minimum}
        self._used: dict[str, dict[EnvironmentId, Environment]] = {
            name: {Environment().id: Environment()} for name in self._pools
        }
        self._told: dict[tuple[NodeId, EnvironmentId], Warm] = {}

    def used(self, pool: str, environment: Environment) -> None:
        """A lease of this pool was asked for in this environment: keep spares of it from now on."""
        used = self._used.get(pool)
        if used is None:
            return
        used.pop(environment.id, None)
        used[environment.id] = environment
        if len(used) > ENVIRONMENTS_MAX:
            del used[next(iter(used))]

    def forget(self, node: NodeId) -> None:
        """Its agent is new: nothing it was told counts."""
        self._told = {key: warm for key, warm in self._told.items() if key[0] != node}

    def due(self, nodes: Sequence[NodeId]) -> list[tuple[NodeId, Warm]]:
        """Orders to give now, spreading each minimum over the nodes."""
        wanted = self._wanted(nodes)
        for key, warm in self._told.items():
            if key not in wanted and key[0] in nodes and warm.spares:
                wanted[key] = Warm(number=0, environment=warm.environment, spares=0)
        due = [(key[0], warm) for key, warm in wanted.items() if self._told.get(key) != warm]
        self._told = wanted
        return due

    def _wanted(self, nodes: Sequence[NodeId]) -> dict[tuple[NodeId, EnvironmentId], Warm]:
        wanted: dict[tuple[NodeId, EnvironmentId], Warm] = {}
        for name, pool in self._pools.items():
            for environment in self._used[name].values():
                for rank, node in enumerate(nodes):
                    share = pool.minimum // len(nodes) + (rank < pool.minimum % len(nodes))
                    before = wanted.get((node, environment.id))
                    spares = share + (before.spares if before else 0)
                    wanted[node, environment.id] = Warm(number=0, environment=environment, spares=spares)
        return wanted
