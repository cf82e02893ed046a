"""Choose the elastic leases that make room for another: for a reserved one any, for others idle ones.

Invariant: pure; as few leases as a greedy choice gives, youngest first (they lose the least work), and leases
that are leaving anyway are counted before any further one is asked to go.
"""

from isthmus.core.ids import LeaseId
from isthmus.core.model import Resources
from isthmus.policy.snapshot import Preemptible, Snapshot


def victims(
    snapshot: Snapshot, resources: Resources, count: int, only_idle: bool = False
) -> tuple[LeaseId, ...]:
    """Leases to drain so that `count` leases of `resources` fit; empty when that cannot be reached (or needs
    none).
    """
    by_node: dict[str, list[Preemptible]] = {}
    for lease in snapshot.preemptible:
        if only_idle and not (lease.idle or lease.leaving):
            continue
        by_node.setdefault(lease.node, []).append(lease)
    chosen: list[LeaseId] = []
    found = 0
    for row, node in enumerate(snapshot.nodes.ids):
        if not snapshot.nodes.open[row]:
            continue
        free = [
            int(snapshot.nodes.free_cores[row]),
            int(snapshot.nodes.free_memory_bytes[row]),
            int(snapshot.nodes.free_gpus[row]),
        ]
        waiting = sorted(
            by_node.get(node, ()), key=lambda lease: (not lease.leaving, -lease.created_s, lease.lease)
        )
        found, taken = _clear(free, waiting, resources, found, count)
        chosen += taken
        if found >= count:
            return tuple(chosen)
    return ()


def _clear(
    free: list[int], waiting: list[Preemptible], resources: Resources, found: int, count: int
) -> tuple[int, list[LeaseId]]:
    """Empty one node lease by lease while that makes room; leases that would not help are kept."""
    need = (resources.cores, resources.memory_bytes, resources.gpus)
    kept: list[LeaseId] = []
    pending: list[LeaseId] = []
    queue = list(waiting)
    while found < count:
        if all(have >= want for have, want in zip(free, need, strict=True)):
            free = [have - want for have, want in zip(free, need, strict=True)]
            found += 1
            kept += pending
            pending = []
        elif queue:
            lease = queue.pop(0)
            free = [free[0] + lease.cores, free[1] + lease.memory_bytes, free[2] + lease.gpus]
            if not lease.leaving:
                pending.append(lease.lease)
        else:
            break
    return found, kept
