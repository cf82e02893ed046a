"""The socket and the server below the HTTP application."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from isthmus.core.errors import SettingsError
from isthmus.core.settings import GatewaySettings
from isthmus.gateway.connections import BoundedProtocol
from isthmus.node.messages import MESSAGE_BYTES_MAX

SHUTDOWN_S = 1  # for answers on their way; waiting requests are cancelled
KEEP_ALIVE_S = 60
BACKLOG = 1024


def listen(settings: GatewaySettings, preferred_port: int) -> socket.socket:
    """Bind at once, so that the address is known before anything is told it. Raises SettingsError."""
    for port in [settings.port] if settings.port else [preferred_port, 0]:
        try:
            listener = socket.create_server((settings.host, port), backlog=BACKLOG)
            break
        except OSError as error:
            failure = error
    else:
        where = f"{settings.host}:{settings.port}"
        no_host = isinstance(failure, socket.gaierror) or failure.errno == errno.EADDRNOTAVAIL
        setting = "gateway.host" if no_host else "gateway.port"
        raise SettingsError(f"cannot listen at {where}: {failure.strerror}; change {setting}")
    # Connections inherit it. Without it each answer of two writes waits 40 ms for the peer's delayed ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(settings: GatewaySettings, listener: socket.socket) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "") else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the site decides what a signal means."""

    def __init__(self, application: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                application,
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                http=BoundedProtocol,
                lifespan="off",
                ws="websockets-sansio",
                ws_max_size=MESSAGE_BYTES_MAX,
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=SHUTDOWN_S,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """`serve` returns soon, after the answers on their way."""
        self.should_exit = True
