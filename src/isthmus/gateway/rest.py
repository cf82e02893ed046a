"""The site's HTTP application: the operations of all nouns, the agents' WebSocket, health, metrics, OpenAPI.

Loopback by default, so no TLS here: a site that listens elsewhere belongs behind a proxy that ends TLS.
"""

from collections.abc import Iterable

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from isthmus.core.api import ErrorBody
from isthmus.gateway.agents import AgentHub, AgentListener
from isthmus.gateway.openapi import document
from isthmus.gateway.operations import JSON, Guard, Operation, endpoint, failure

METRICS_MEDIA = "text/plain; version=0.0.4; charset=utf-8"


def application(
    operations: Iterable[Operation], guard: Guard, hub: AgentHub, listener: AgentListener, body_bytes_max: int
) -> Starlette:
    operations = sorted(operations, key=lambda operation: ("{" in operation.path, operation.path))
    described = msgspec.json.encode(document(operations))

    async def agent(websocket: WebSocket) -> None:
        await hub.serve(websocket, listener)

    async def openapi(request: Request) -> Response:
        return Response(described, media_type=JSON)

    async def healthz(request: Request) -> Response:
        return Response(b'{"ok":true}', media_type=JSON)

    routes = [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        WebSocketRoute("/agent", agent),
        *(
            Route(operation.path, endpoint(operation, guard, body_bytes_max), methods=[operation.method])
            for operation in operations
        ),
    ]
    site = Starlette(routes=routes, exception_handlers={HTTPException: _explain})
    site.router.redirect_slashes = False  # a path with a slash too many names nothing
    return site


async def _explain(request: Request, error: Exception) -> Response:
    """No such path or method, in the same words as every other failure."""
    assert isinstance(error, HTTPException)
    code = "NotFoundError" if error.status_code == 404 else "InvalidRequestError"
    asked = f"{request.method} {request.url.path[:200]}"
    words = f"{asked}: {error.detail}; /openapi.json lists what this site serves"
    answer = failure(error.status_code, ErrorBody(code=code, message=words))
    answer.headers.update(error.headers or {})
    return answer
