"""One HTTP connection, with limits on what a stranger costs before anything is known of them.

uvicorn's parser takes request lines, headers and trailers of any length from anybody, and waits for them for
ever. Invariant: a connection on which no request is under way holds at most HEAD_BYTES_MAX of input, for at
most HEAD_S; beyond `connections_max()` the one that has been idle for longest makes room.
Not here: bodies, which are read after the key was checked (`operations.py`), and WebSockets (`agents.py`).
"""

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from isthmus.telemetry import metrics

HEAD_S = 10.0  # from the connection's start, or a request's first byte, to the end of its headers
HEAD_BYTES_MAX = 64 * 2**10
CONNECTIONS_MAX = 4096
_DESCRIPTORS_SHARE = 0.75  # the rest is for agents, files and durable calls


def connections_max() -> int:
    """As many as there are descriptors for."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return int(min(CONNECTIONS_MAX, descriptors * _DESCRIPTORS_SHARE))


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, cut off when its peer costs too much."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._silent_bytes = 0  # received since the request last moved on
        self._in_body = False
        self._patience: asyncio.TimerHandle | None = None
        self.idle_since_s = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()
        if len(self.connections) > connections_max():
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._silent_bytes += len(data)
        if not self._in_body and self._patience is None:
            self._expect_head()
        super().data_received(data)
        if self._silent_bytes > HEAD_BYTES_MAX:
            self.cut_off()

    def on_headers_complete(self) -> None:
        self._silent_bytes = 0
        self._in_body = True
        self._forget_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent_bytes = 0
        self._in_body = False
        self.idle_since_s = self.loop.time()
        super().on_message_complete()

    @property
    def is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def cut_off(self) -> None:
        if not self.transport.is_closing():
            metrics.STRANGERS.labels("http").inc()
            self.transport.abort()

    def _expect_head(self) -> None:
        self._patience = self.loop.call_later(HEAD_S, self.cut_off)

    def _forget_head(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _make_room(self) -> None:
        idle = [each for each in self.connections if isinstance(each, BoundedProtocol) and each.is_idle]
        min(idle, key=lambda each: each.idle_since_s, default=self).cut_off()
