"""The agent's line to the site: dial, prove, read orders, send answers and reports; dial again when it
breaks.

Invariant: nothing is sent or obeyed before both sides have proved that they hold the agent's key. What the
site must not miss (ends of leases) is kept by the caller until `flushed` says that its end has received it.
"""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, WebSocketException

from isthmus.core.errors import AuthError, SiteUnavailableError
from isthmus.node.messages import (
    DISMISSED,
    MESSAGE_BYTES_MAX,
    AgentHello,
    AnyMessage,
    Challenge,
    Order,
    SiteHello,
    decode,
    encode,
)

HANDSHAKE_S = 5.0
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.05, 2.0  # a local site restarts in a second; a far one must not be stormed
NONCE_BYTES = 32


def agent_proof(key: bytes, site_nonce: bytes, agent_nonce: bytes) -> bytes:
    return hmac.digest(key, b"agent" + site_nonce + agent_nonce, hashlib.sha256)


def site_proof(key: bytes, site_nonce: bytes, agent_nonce: bytes) -> bytes:
    return hmac.digest(key, b"site" + agent_nonce + site_nonce, hashlib.sha256)


class DismissedError(SiteUnavailableError):
    """The allocation of this agent is over, and nothing here is wanted any more."""


class Connection:
    """One authenticated WebSocket."""

    def __init__(self, socket: ClientConnection, orphan_s: float) -> None:
        self._socket = socket
        self.orphan_s = orphan_s

    async def send(self, message: AnyMessage) -> None:
        """Raises SiteUnavailableError when the line is broken."""
        try:
            await self._socket.send(encode(message))
        except WebSocketException as error:
            raise SiteUnavailableError(f"the line to the site broke: {error}") from error

    async def flushed(self) -> None:
        """Returns when the site's end has received everything sent so far. Raises SiteUnavailableError."""
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                await (await self._socket.ping())
        except (WebSocketException, TimeoutError) as error:
            raise SiteUnavailableError(f"the line to the site broke: {error}") from error

    async def orders(self, obey: Callable[[Order], None]) -> None:
        """Hand over each order until the line breaks. A message that is no order is a reason to break it."""
        try:
            async for data in self._socket:
                message = decode(data) if isinstance(data, bytes) else None
                if not isinstance(message, Order):
                    raise SiteUnavailableError(
                        "the site sent something that is no order; versions may differ"
                    )
                obey(message)
        except msgspec.MsgspecError as error:
            raise SiteUnavailableError(f"the site sent an unreadable message: {error}") from error
        except WebSocketException as error:
            end = error.rcvd if isinstance(error, ConnectionClosed) else None
            if end is not None and end.code == DISMISSED:
                raise DismissedError("the site says that this allocation is over") from error
            raise SiteUnavailableError(f"the line to the site broke: {error}") from error

    async def close(self) -> None:
        await self._socket.close()


async def dial(url: str, key: bytes, introduce: Callable[[bytes, bytes], AgentHello]) -> Connection:
    """Connect and prove, both ways.

    key        this agent's own, which the site can derive from its name
    introduce  (our nonce, our proof) -> the AgentHello to send
    raises     SiteUnavailableError (nobody there), AuthError (it does not know our key)
    """
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            socket = await connect(url, max_size=MESSAGE_BYTES_MAX, compression=None, proxy=None)
    except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as error:
        raise SiteUnavailableError(f"no site at {url}: {error}") from error
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            return await _prove(socket, key, introduce)
    except (AuthError, SiteUnavailableError):
        await socket.close()
        raise
    except (OSError, TimeoutError, WebSocketException, msgspec.MsgspecError) as error:
        await socket.close()
        raise SiteUnavailableError(f"the site at {url} broke off the handshake: {error}") from error


async def _prove(
    socket: ClientConnection, key: bytes, introduce: Callable[[bytes, bytes], AgentHello]
) -> Connection:
    challenge = decode(_bytes(await socket.recv()))
    if not isinstance(challenge, Challenge):
        raise SiteUnavailableError("the site did not begin with a challenge")
    nonce = secrets.token_bytes(NONCE_BYTES)
    await socket.send(encode(introduce(nonce, agent_proof(key, challenge.nonce, nonce))))
    answer = decode(_bytes(await socket.recv()))
    if not isinstance(answer, SiteHello):
        raise SiteUnavailableError("the site did not answer with its proof")
    if not hmac.compare_digest(answer.proof, site_proof(key, challenge.nonce, nonce)):
        raise AuthError("the site does not know this agent's key; nothing it orders will be done")
    return Connection(socket, answer.orphan_s)


async def backoff(attempt: int, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
    """Wait before dialling again: doubling, with a bound, and with jitter so that a site is not stormed."""
    span_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(attempt, 16))
    await sleep(span_s * (0.5 + secrets.randbelow(1000) / 2000))


def _bytes(data: str | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.encode()
