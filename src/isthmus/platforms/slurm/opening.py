"""Choose how to speak to Slurm, by the settings: slurmrestd, commands on a login node, or commands here."""

from isthmus.core.errors import SettingsError
from isthmus.core.settings import SlurmSettings
from isthmus.platforms.slurm.client import SlurmClient
from isthmus.platforms.slurm.command_client import CommandClient
from isthmus.platforms.slurm.rest_client import RestClient
from isthmus.platforms.slurm.running import Running, RunningHere


def open_client(settings: SlurmSettings, site_url: str = "") -> SlurmClient:
    """Nothing is connected yet. Raises SettingsError.

    site_url  where the site listens, for a tunnel from the login node; without it none is made
    """
    if settings.rest.url and settings.ssh.host:
        raise SettingsError("slurm.rest.url and slurm.ssh.host are both set; Slurm is reached by one of them")
    if settings.rest.url:
        return RestClient(settings)
    return CommandClient(settings, _by_ssh(settings, site_url) if settings.ssh.host else RunningHere())


def _by_ssh(settings: SlurmSettings, site_url: str) -> Running:
    try:
        from isthmus.platforms.slurm.ssh import RunningBySsh
    except ModuleNotFoundError as error:
        if error.name != "asyncssh":
            raise
        raise SettingsError("slurm.ssh.host needs asyncssh: pip install 'isthmus[ssh]'") from error
    return RunningBySsh(settings.ssh, site_url)
