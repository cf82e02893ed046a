"""The seam between a lease and what the operating system can enforce of it."""

from pathlib import Path
from typing import NamedTuple, Protocol

from isthmus.core.ids import LeaseId
from isthmus.core.model import Enforcement

PIDS_MAX = (
    512  # processes and threads of one lease: enough for any pool, too few for a fork bomb to hurt the node
)
GROUP_PREFIX = "isthmus-"


class Share(NamedTuple):
    """What one lease gets: these very cores, and so much memory.

    idle_cores  of a harvested lease: so many of `cores`, which it shares, and only while nobody else wants
                them; 0: `cores` are its own
    amounts     of further kinds
    """

    cores: tuple[int, ...]
    memory_bytes: int
    idle_cores: int = 0
    amounts: tuple[tuple[str, int], ...] = ()


class Consumption(NamedTuple):
    """What a lease's processes used; `rss_bytes_max` is 0 where the mechanism keeps no maximum."""

    cpu_ns: int
    rss_bytes: int
    rss_bytes_max: int


def reserve_name(pid: int) -> LeaseId:
    """What `reserve` holds for a process goes by this name in `destroy` and `remains`."""
    return LeaseId(f"spare-{pid}")


class Isolation(Protocol):
    """One mechanism. All methods are idempotent and do no more than a few system calls, except `destroy`.

    They raise OSError when the system refuses what it allowed at the probe.
    """

    @property
    def mechanism(self) -> str: ...

    @property
    def enforcement(self) -> Enforcement:
        """What leases get from it."""
        ...

    def probe(self) -> str:
        """ "" when it works here, for this user; else why not, in one line. Leaves nothing behind."""
        ...

    def reserve(self, pid: int) -> None:
        """Prepare a process that has no lease yet, where that makes `attach` faster; else do nothing."""
        ...

    def create(self, lease: LeaseId, share: Share, reserved: int = 0) -> Enforcement:
        """Make room for the lease; says what will really be enforced on processes attached to it.

        reserved  a process that `reserve` has prepared and that will be attached first
        """
        ...

    def attach(self, lease: LeaseId, pid: int) -> None:
        """Put a process, and what it will fork, under the lease."""
        ...

    def consumption(self, lease: LeaseId) -> Consumption: ...

    def oom_kills(self, lease: LeaseId) -> int:
        """How many of its processes were killed for going over its memory."""
        ...

    def freeze(self, lease: LeaseId) -> None:
        """Stop every process of the lease where it is; its memory stays."""
        ...

    def thaw(self, lease: LeaseId) -> None: ...

    def destroy(self, lease: LeaseId) -> None:
        """Kill every process of the lease, wait until they are gone, and remove what `create` made.
        Blocks.
        """
        ...

    def group(self, lease: LeaseId) -> Path | None:
        """The lease's group in the version 2 hierarchy, if it has one."""
        ...

    def sweep(self) -> None:
        """Remove what agents of forgotten state directories left: empty, old, and named as ours."""
        ...

    def remains(self) -> list[LeaseId]:
        """Leases that an earlier agent of this state directory left here."""
        ...
