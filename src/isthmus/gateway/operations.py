"""One REST operation as data, and the one way in which all are served.

An `Operation` says what it takes and gives; `endpoint` turns it into a Starlette endpoint that authenticates,
checks the role, bounds and decodes the body, encodes the reply, maps errors, counts, and audits what changes
something. The OpenAPI document (`openapi.py`) is made from the same table, so the two cannot differ.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from isthmus.core import errors
from isthmus.core.api import ErrorBody
from isthmus.core.model import Principal, Record
from isthmus.gateway.statuses import body_of, status_of
from isthmus.telemetry import metrics

JSON = "application/json"
MSGPACK = "application/msgpack"
SMALL_BODY_BYTES_MAX = 1 << 20  # all but durable calls, whose arguments may be as large as the settings allow

EVERYBODY = frozenset({"admin", "operator", "user"})
OPERATORS = frozenset({"admin", "operator"})
ADMINS = frozenset({"admin"})
NESTED = EVERYBODY | {"lease"}  # also code that runs under a lease, for its own lease only

_log = structlog.get_logger("gateway.rest")


class NoQuery(Record, frozen=True):
    """This operation takes no query parameters."""


class Asked(NamedTuple):
    """One authenticated, decoded request. `query` and `body` have the types that the operation names."""

    principal: Principal
    path: Mapping[str, str]
    query: Any
    body: Any
    idempotency_key: str = ""


class Operation(NamedTuple):
    """method, path      `DELETE`, `/v1/leases/{lease}`
    roles             who may ask at all; whose things one may touch is decided by what `run` calls
    body, reply       msgspec types; None: no body; `bytes` as reply: sent as it is
    packed            body and reply travel as msgpack (payload bytes inside), not as JSON
    detached          goes on when the client hangs up; else it is cancelled then
    """

    method: str
    path: str
    summary: str
    run: Callable[[Asked], Awaitable[Any]]
    reply: Any
    roles: frozenset[str] = EVERYBODY
    body: Any = None
    query: type[Record] = NoQuery
    status: int = 200
    packed_body: bool = False
    packed_reply: bool = False
    media: str = JSON
    large: bool = False
    detached: bool = True

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


class Guard(Protocol):
    """Who asks, and the memory of what was asked."""

    def identify(self, authorization: str) -> Principal:
        """Raises AuthError."""
        ...

    def note(self, principal: Principal, action: str, status: int, detail: str) -> None: ...


class _BodyTooLarge(Exception):
    pass


Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def endpoint(operation: Operation, guard: Guard, body_bytes_max: int) -> Endpoint:
    limit_bytes = body_bytes_max if operation.large else min(SMALL_BODY_BYTES_MAX, body_bytes_max)

    async def answer(request: Request) -> Response:
        started_s = time.monotonic()
        principal: Principal | None = None
        detail = ""
        try:
            principal = guard.identify(request.headers.get("authorization", ""))
            if principal.role not in operation.roles:
                allowed = ", ".join(sorted(operation.roles))
                raise errors.PermissionDeniedError(
                    f"{operation.name} needs role {allowed}; you are {principal.role}"
                )
            asked = await _decode(operation, request, principal, limit_bytes)
            response = _encode(operation, await _run(operation, asked, request))
        except errors.IsthmusError as error:
            detail = type(error).__name__
            response = failure(status_of(error), body_of(error))
        except _BodyTooLarge:
            detail = "body too large"
            words = f"the body is larger than {limit_bytes} bytes; pass large data by reference"
            response = failure(413, ErrorBody(code="InvalidRequestError", message=words))
        except ClientDisconnect:
            detail = "client hung up"
            response = Response(status_code=499)
        except Exception as error:  # a task boundary: our own fault, logged with its traceback
            detail = type(error).__name__
            _log.exception("request failed", operation=operation.name)
            words = f"the site failed ({type(error).__name__}); its log (logs/site.log) has the traceback"
            response = failure(500, ErrorBody(code="IsthmusError", message=words))
        metrics.REQUESTS.labels(operation.name, response.status_code).inc()
        metrics.REQUEST_SECONDS.labels(operation.name).observe(time.monotonic() - started_s)
        if principal is not None and operation.method != "GET":
            guard.note(
                principal, f"{operation.method} {request.url.path[:200]}", response.status_code, detail
            )
        return response

    return answer


def failure(status: int, body: ErrorBody) -> Response:
    headers = (
        {"www-authenticate": "Bearer"} if status == 401 else {"retry-after": "1"} if status == 503 else {}
    )
    return Response(msgspec.json.encode({"error": body}), status, headers=headers, media_type=JSON)


async def _decode(operation: Operation, request: Request, principal: Principal, limit_bytes: int) -> Asked:
    body: Any = None
    try:
        query = msgspec.convert(dict(request.query_params), operation.query, strict=False)
        if operation.body is not None:
            data = await _read_body(request, limit_bytes)
            decode = msgspec.msgpack.decode if operation.packed_body else msgspec.json.decode
            body = decode(data, type=operation.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidRequestError(f"{operation.name}: {error}") from error
    key = request.headers.get("idempotency-key", "")
    if len(key) > 200:
        raise errors.InvalidRequestError("an Idempotency-Key has at most 200 characters")
    return Asked(principal, request.path_params, query, body, key)


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limit_bytes:
        raise _BodyTooLarge
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise _BodyTooLarge
        chunks.append(chunk)
    return b"".join(chunks)


async def _run(operation: Operation, asked: Asked, request: Request) -> Any:
    if operation.detached:
        return await operation.run(asked)
    work = asyncio.ensure_future(operation.run(asked))
    watch = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        work.cancel()
        watch.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _encode(operation: Operation, reply: Any) -> Response:
    if operation.packed_reply:
        return Response(msgspec.msgpack.encode(reply), operation.status, media_type=MSGPACK)
    body = reply if isinstance(reply, bytes) else msgspec.json.encode(reply)
    return Response(body, operation.status, media_type=operation.media)
