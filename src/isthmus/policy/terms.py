"""What a policy file says about tenants, and how the past counts.

    [fair]
    half_life_h = 24.0            # use that long ago counts half; 0: only what is held now counts

    [tenants.physics]
    weight = 2.0                  # its share compared with others'
    priority = 5                  # its requests wait before those of lower priority, whatever the shares
    lend = true                   # others may borrow what it does not use of its guarantee, as elastic leases
    guarantee = { cores = 32, memory = "128GiB", gpus = 2, licenses = { matlab = 1 } }

A guarantee is what a tenant gets back at once when it asks for it: elastic leases of those who hold more than
their own are pushed out. Only the resources it names are guaranteed.

Invariant: values only. Not here: what follows from them (`fairness.py`, `guarantees.py`).
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from isthmus.core.kinds import COUNT_MAX, Asked
from isthmus.core.units import parse_bytes

HALF_LIFE_H_MAX = 24.0 * 365
PRIORITY_MAX = 1000

Priority = Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]
Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a policy file; unknown keys are errors."""


class Fair(_Table, frozen=True):
    half_life_h: Annotated[float, Meta(ge=0, le=HALF_LIFE_H_MAX)] = 24.0

    @property
    def half_life_s(self) -> float:
        return self.half_life_h * 3600.0


class Guarantee(Asked, frozen=True, kw_only=True):
    """0 (or an empty memory): this resource is not guaranteed."""

    cores: Count = 0
    memory: str = ""
    gpus: Count = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes(self.memory or 0)

    @property
    def memory_bytes(self) -> int:
        return parse_bytes(self.memory or 0)


class Terms(_Table, frozen=True):
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    priority: Priority = 0
    lend: bool = True
    guarantee: Guarantee = Guarantee()
