"""Names of things: each id is a type of its own, so that a lease id cannot be passed for a node id.

Ids sort by creation time and carry a prefix (`ls_`, `rq_`, ...), so that a log's reader knows what it sees.
"""

import secrets
import time
from typing import NewType

LeaseId = NewType("LeaseId", str)
RequestId = NewType("RequestId", str)
CallId = NewType("CallId", str)  # a durable call; calls on a channel are numbered by that channel
ExecutorId = NewType("ExecutorId", str)
AllocationId = NewType("AllocationId", str)
NodeId = NewType("NodeId", str)
TenantId = NewType("TenantId", str)
KeyId = NewType("KeyId", str)
EnvironmentId = NewType("EnvironmentId", str)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


def new_id(prefix: str) -> str:
    """`prefix_` and 16 characters: 8 of time (milliseconds) and 8 of randomness (40 bits)."""
    return f"{prefix}_{_base32(time.time_ns() // 1_000_000, 8)}{_base32(secrets.randbits(40), 8)}"


def _base32(number: int, digits: int) -> str:
    letters = []
    for _ in range(digits):
        letters.append(_ALPHABET[number & 31])
        number >>= 5
    return "".join(reversed(letters))
