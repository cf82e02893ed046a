"""Pools of allocations in words, for `isthmus status` and `isthmus explain`."""

from isthmus.cli.output import Row


def pool_words(pool: Row) -> list[str]:
    """How a pool stands, and why it has no more."""
    size = f"{pool['running']} of {pool['minimum']} to {pool['maximum']} allocations ({pool['contract']})"
    use = f"{pool['cores_free']} of {pool['cores']} cores free, {pool['leases']} leases"
    return [f"{size}, {use}", *pool["words"]]
