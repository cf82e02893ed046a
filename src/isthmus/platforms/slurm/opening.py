"""Choose how to speak to Slurm, by the settings."""

from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm.client import SlurmClient
from isthmus.platforms.slurm.command_client import CommandClient
from isthmus.platforms.slurm.running import RunningHere


def open_client(settings: SlurmSettings, site_url: str = "") -> SlurmClient:
    return CommandClient(settings, RunningHere())
