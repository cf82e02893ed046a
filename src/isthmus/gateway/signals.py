"""Signals from outside for the rules - carbon intensity, price, load of the cooling - read by the site.

    a file or a URL  ->  {"carbon": 312.0, "price": 0.12}  ->  `signal.carbon` in conditions

Invariant: what cannot be read changes nothing until it is stale; then rules see no signals, and
`has(signal.x)` is false. Only numbers at the top level count. Not here: what rules make of them
(`isthmus.policy`).
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import structlog

from isthmus.core.clock import Clock
from isthmus.core.settings import PolicySettings

BYTES_MAX = 64 * 1024
SIGNALS_MAX = 64
TIMEOUT_S = 10.0

_log = structlog.get_logger("gateway.signals")


class SignalError(ValueError):
    """The source said something that is no object of numbers."""


class Signals:
    """`tell` is given all signals whenever they were read, and none when they have become stale."""

    def __init__(
        self, settings: PolicySettings, tell: Callable[[Mapping[str, float]], None], clock: Clock
    ) -> None:
        self._settings = settings
        self._tell = tell
        self._clock = clock
        self._read_at = clock.monotonic()
        self._client: httpx.AsyncClient | None = None  # one for all readings

    async def run(self) -> None:
        """Until cancelled; at once over where no source is named."""
        try:
            while self._settings.signals:
                await self.read_once()
                await self._clock.sleep(self._settings.signals_s)
        finally:
            if self._client is not None:
                await self._client.aclose()

    async def read_once(self) -> None:
        try:
            signals = parse(await self._fetch(self._settings.signals))
        except (OSError, httpx.HTTPError, httpx.InvalidURL, TimeoutError, SignalError) as error:
            age_s = self._clock.monotonic() - self._read_at
            _log.warning("signals not read", source=self._settings.signals, age_s=age_s, why=str(error))
            if age_s >= self._settings.signals_stale_s:
                self._tell({})
            return
        self._read_at = self._clock.monotonic()
        self._tell(signals)

    async def _fetch(self, source: str) -> bytes:
        """Raises OSError, httpx.HTTPError, TimeoutError, SignalError."""
        if not source.startswith(("http://", "https://")):
            return await asyncio.to_thread(_read, Path(source))
        if self._client is None:
            self._client = await asyncio.to_thread(_client, source)
        async with asyncio.timeout(TIMEOUT_S), self._client.stream("GET", source) as response:
            response.raise_for_status()
            body = b""
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > BYTES_MAX:
                    raise SignalError(f"more than {BYTES_MAX} bytes")
        return body


def parse(body: bytes) -> dict[str, float]:
    """The numbers of a JSON object. Raises SignalError."""
    try:
        tree = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SignalError(f"not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise SignalError("not a JSON object")
    numbers = {name: float(value) for name, value in tree.items() if _is_number(value)}
    if len(numbers) > SIGNALS_MAX:
        raise SignalError(f"{len(numbers)} signals; at most {SIGNALS_MAX} are taken")
    return numbers


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _client(source: str) -> httpx.AsyncClient:
    """For https it reads all certificates, tens of milliseconds in which the site would stand still."""
    return httpx.AsyncClient(follow_redirects=False, verify=source.startswith("https:"))


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        body = file.read(BYTES_MAX + 1)
    if len(body) > BYTES_MAX:
        raise SignalError(f"more than {BYTES_MAX} bytes")
    return body
