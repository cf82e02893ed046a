"""What a member of a group call is given: `isthmus.Context`.

Not here: what it does (`isthmus.fabric.collectives`).
"""

from isthmus.fabric.collectives import Group as Context

__all__ = ["Context"]
