"""Leases drawn from Slurm, by its own commands: no administrator is needed."""

from isthmus.platforms.slurm.platform import SlurmPlatform
from isthmus.platforms.slurm.running import Running, RunningHere

__all__ = ["Running", "RunningHere", "SlurmPlatform"]
