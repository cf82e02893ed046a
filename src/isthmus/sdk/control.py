"""The client's side of the site's REST interface: leases, never calls.

Invariants: every request has a time limit; only idempotent requests are repeated; every failure is an error
of `core.errors` (the site's own, by its code, or SiteUnavailableError).
Not here: when to ask for a lease (`dispatch.py`), what to do with one (`supply.py`).
"""

import contextlib
import re
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from isthmus.core import api, errors
from isthmus.core.ids import CallId, ExecutorId, LeaseId
from isthmus.core.model import Lease

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

CONNECT_TIMEOUT_S = 2.0
REQUEST_TIMEOUT_S = 10.0
START_ALLOWANCE_S = 30.0  # beyond a lease request's own wait_s: a cold environment may have to be built
REPEAT_PAUSES_S = (0.05, 0.2)  # before the second and third try of an idempotent request
_MSGPACK = {"content-type": "application/msgpack"}
_JSON = {"content-type": "application/json"}
_ID = re.compile("[A-Za-z0-9_-]+")
_CONNECTED = ("connection.connect_tcp.complete", "connection.start_tls.complete")  # httpcore's trace events


class Control:
    """Speaks to one site. httpx is imported with the first request, so that `import isthmus` stays light."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._lock = threading.Lock()
        self._client: httpx.Client | None = None
        self._active = 0  # requests under way; the client is closed when the last one ends
        self._closed = False
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    # leases ------------------------------------------------------------------------
    def request_leases(self, request: api.LeaseRequest) -> api.LeaseReply:
        body = msgspec.json.encode(request)
        timeout_s = request.wait_s + START_ALLOWANCE_S
        return self._fetch(api.LeaseReply, "POST", "/v1/leases", body, timeout_s=timeout_s)

    def renew(self, leases: tuple[LeaseId, ...]) -> api.RenewReply:
        body = msgspec.json.encode(api.RenewRequest(leases=leases))
        return self._fetch(api.RenewReply, "POST", "/v1/leases/renew", body)

    def release(self, lease: LeaseId) -> None:
        self._repeat("DELETE", f"/v1/leases/{_part(lease)}")

    def lease(self, lease: LeaseId) -> Lease:
        return self._read(Lease, f"/v1/leases/{_part(lease)}")

    def leases(self) -> list[Lease]:
        return self._read(list[Lease], "/v1/leases")

    def add_executor(self, lease: LeaseId) -> api.ExecutorReply:
        path = f"/v1/leases/{_part(lease)}/executors"
        return self._fetch(api.ExecutorReply, "POST", path, timeout_s=START_ALLOWANCE_S)

    def kill_executor(self, lease: LeaseId, executor: ExecutorId) -> None:
        self._repeat("DELETE", f"/v1/leases/{_part(lease)}/executors/{_part(executor)}")

    def bill(self) -> list[api.BillRow]:
        return self._read(list[api.BillRow], "/v1/usage")

    # durable calls ------------------------------------------------------------------------
    def submit_call(self, call: api.DurableCall) -> api.CallSummary:
        body = msgspec.msgpack.encode(call)
        if call.idempotency_key:  # the key makes repeating it safe
            return msgspec.json.decode(
                self._repeat("POST", "/v1/calls", body, _MSGPACK), type=api.CallSummary
            )
        return self._fetch(api.CallSummary, "POST", "/v1/calls", body, headers=_MSGPACK)

    def call_result(self, call: CallId, wait_s: float) -> api.CallResult:
        body = self._repeat(
            "GET", f"/v1/calls/{_part(call)}/result?wait_s={wait_s}", timeout_s=wait_s + REQUEST_TIMEOUT_S
        )
        return msgspec.msgpack.decode(body, type=api.CallResult)

    def cancel_call(self, call: CallId) -> None:
        self._repeat("DELETE", f"/v1/calls/{_part(call)}")

    def hang_up(self) -> None:
        """Break off the requests under way: the site takes back what it has not answered yet. Those fail."""
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes who reads from it, as closing would not

    def close(self) -> None:
        """Free the connections, at the end of the last request under way. Late requests still work, one by
        one.
        """
        with self._lock:
            self._closed = True
            self._close_if_idle()

    # inside ------------------------------------------------------------------------
    def _read(self, kind: type[T], path: str) -> T:
        return msgspec.json.decode(self._repeat("GET", path), type=kind)

    def _fetch(
        self, kind: type[T], method: str, path: str, body: bytes = b"",
        timeout_s: float = REQUEST_TIMEOUT_S, headers: dict[str, str] = _JSON,
    ) -> T:  # fmt: skip
        return msgspec.json.decode(self._once(method, path, body, timeout_s, headers), type=kind)

    def _repeat(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] = _JSON,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> bytes:  # fmt: skip
        for pause_s in REPEAT_PAUSES_S:
            try:
                return self._once(method, path, body, timeout_s, headers)
            except errors.SiteUnavailableError:
                time.sleep(pause_s)
        return self._once(method, path, body, timeout_s, headers)

    def _once(self, method: str, path: str, body: bytes, timeout_s: float, headers: dict[str, str]) -> bytes:
        import httpx

        limits = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        client = self._enter()
        try:
            reply = client.request(
                method, path, content=body, headers=headers, timeout=limits, extensions={"trace": self._trace}
            )
        except httpx.HTTPError as error:
            raise errors.SiteUnavailableError(
                f"the site at {self.url} did not answer {method} {path} ({type(error).__name__}: {error}); "
                "open leases go on; see `isthmus status`"
            ) from error
        finally:
            self._leave()
        if reply.is_success:
            return reply.content
        raise _error_of(reply.content, reply.status_code, self.url)

    def _trace(self, event: str, details: dict[str, Any]) -> None:
        if event in _CONNECTED:
            connection = details["return_value"].get_extra_info("socket")
            if connection is not None:
                self._sockets.add(connection)

    def _enter(self) -> "httpx.Client":
        import httpx

        with self._lock:
            self._active += 1
            if self._client is None:
                bearer = {"authorization": f"Bearer {self._key}"} if self._key else {}
                loopback = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
                # A proxy meant for the outside world must not stand between us and our own machine. Without
                # https there is nothing to verify, and reading all certificates takes some 15 ms.
                self._client = httpx.Client(
                    base_url=self.url,
                    headers=bearer,
                    trust_env=not loopback,
                    verify=self.url.startswith("https:"),
                )
            return self._client

    def _leave(self) -> None:
        with self._lock:
            self._active -= 1
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closed and self._active == 0 and self._client is not None:
            self._client.close()
            self._client = None


def _part(given: str) -> str:
    """One segment of a path. What is no id would name another path (`..`), so nobody is asked about it."""
    if not isinstance(given, str) or _ID.fullmatch(given) is None:
        raise errors.NotFoundError(f"{given!r} is no id; one looks like call_01kayv2m8qz4x7tn")
    return given


def _error_of(body: bytes, status: int, url: str) -> errors.IsthmusError:
    """The site's error as the class it names; anything else that answers there is an unavailable site."""
    try:
        fields = msgspec.convert(msgspec.json.decode(body)["error"], api.ErrorBody)
    except (msgspec.MsgspecError, KeyError, TypeError):
        return errors.SiteUnavailableError(f"{url} answered HTTP {status} and not as an isthmus site")
    kind: Any = getattr(errors, fields.code, None)
    if isinstance(kind, type) and issubclass(kind, errors.IsthmusError):
        return kind(fields.message)
    return errors.IsthmusError(f"{fields.code}: {fields.message}")
