"""The JSON web token that slurmrestd wants: read from a file or a command, and again before it expires.

Invariant: a token is never logged or put into a message. Its signature is slurmctld's to check; only its
`exp` is read here, because slurmrestd says no more than "unspecified error" of an expired one.
"""

import asyncio
import base64
import binascii
import math
import re
import shlex
import time
from pathlib import Path

import msgspec

from isthmus.core.errors import SettingsError, SiteUnavailableError
from isthmus.core.settings import RestSettings
from isthmus.platforms.slurm import running

MARGIN_S = 30.0  # a token is replaced so long before its end; a short one in the last quarter of its life
_TOKEN = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


class _Claims(msgspec.Struct):
    exp: float = math.inf


class Tokens:
    """Raises SettingsError when there is nowhere to get a token from."""

    def __init__(self, settings: RestSettings, timeout_s: float) -> None:
        if bool(settings.token_file) == bool(settings.token_command):
            raise SettingsError(
                "slurm.rest.url needs one of slurm.rest.token_file and slurm.rest.token_command "
                '(like "scontrol token lifespan=3600")'
            )
        self._settings = settings
        self._timeout_s = timeout_s
        self._renewing = asyncio.Lock()
        self._token = ""
        self._renew_at = -math.inf

    @property
    def source(self) -> str:
        return self._settings.token_file or f"`{self._settings.token_command}`"

    def discard(self) -> None:
        """It was refused: ask for another one next time."""
        self._renew_at = -math.inf

    async def current(self) -> str:
        """A token that has not expired by this machine's clock. Raises SiteUnavailableError."""
        async with self._renewing:
            if time.time() >= self._renew_at:
                await self._renew()
            return self._token

    async def _renew(self) -> None:
        token = await self._read()
        now, expires_s = time.time(), expiry_s(token)
        if expires_s <= now:
            raise SiteUnavailableError(self._say_expired(expires_s, now))
        self._token = token
        self._renew_at = expires_s - min(MARGIN_S, (expires_s - now) / 4)

    async def _read(self) -> str:
        if self._settings.token_command:
            command = tuple(shlex.split(self._settings.token_command))
            words = (await running.RunningHere().run(command, self._timeout_s)).printed
        else:
            try:
                words = Path(self._settings.token_file).expanduser().read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise SiteUnavailableError(f"slurm.rest.token_file: {error}") from error
        found = _TOKEN.search(words)
        if found is None:
            raise SiteUnavailableError(f"{self.source} gives no JSON web token")
        return found[0]

    def _say_expired(self, expires_s: float, now: float) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(expires_s))
        hint = "write a new one there, or set slurm.rest.token_command"
        if self._settings.token_command:
            hint = "is this machine's clock right?"
        return f"the token of {self.source} expired at {at}, {now - expires_s:.0f} s ago; {hint}"


def expiry_s(token: str) -> float:
    """Seconds since the epoch; infinite when it names no end. Raises SiteUnavailableError."""
    payload = token.split(".")[1]
    try:
        plain = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
        return msgspec.json.decode(plain, type=_Claims).exp
    except (binascii.Error, ValueError, msgspec.MsgspecError) as error:
        raise SiteUnavailableError("the token for slurmrestd is no JSON web token") from error
