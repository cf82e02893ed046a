"""The outside worlds from which leases are drawn, behind one Protocol."""

from isthmus.platforms.local import LocalPlatform
from isthmus.platforms.memory import MemoryPlatform
from isthmus.platforms.platform import Allocation, Platform
from isthmus.platforms.slurm import SlurmPlatform

__all__ = ["Allocation", "LocalPlatform", "MemoryPlatform", "Platform", "SlurmPlatform"]
