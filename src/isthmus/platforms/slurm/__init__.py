"""Leases drawn from Slurm as an ordinary user: by its commands, here or by SSH, or by slurmrestd."""

from isthmus.platforms.slurm.client import SlurmClient
from isthmus.platforms.slurm.opening import open_client
from isthmus.platforms.slurm.platform import SlurmPlatform

__all__ = ["SlurmClient", "SlurmPlatform", "open_client"]
