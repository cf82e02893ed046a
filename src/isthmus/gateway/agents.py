"""The site's side of the agents' WebSocket: `leasing.control.NodeControl` over connections that agents dial.

Each connection proves itself first (mutual HMAC, `node.messages`); until then it may only speak small and
soon. A node has one agent: a newer connection replaces the older. Reports are carried out in order by a task
of their own, so that a report whose handling gives orders never waits for itself.

Not here: what orders mean (`isthmus.leasing`), and the agent's side (`isthmus.node`).
"""

import asyncio
import contextlib
import hashlib
import hmac
import secrets
from typing import Protocol

import msgspec
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from isthmus.core import errors, tokens
from isthmus.core.clock import Clock
from isthmus.core.ids import NodeId
from isthmus.node import messages
from isthmus.node.launching import key_holder
from isthmus.node.messages import (
    DISMISSED,
    AgentHello,
    Done,
    ExecutorEnded,
    Failed,
    Heartbeat,
    LeaseEnded,
    Order,
)
from isthmus.telemetry import metrics

HELLO_TIMEOUT_S = 5.0
HELLO_BYTES_MAX = 1 << 20  # a hello lists the leases that still run
ORDER_TIMEOUT_S = 20.0
BUILD_TIMEOUT_S = 900.0  # an order whose environment must first be installed
CLOCKS_DIFFER_S = 5.0  # leases bear it, but their times in logs and bills are not comparable
STRANGERS_MAX = 64  # connections that have not proved themselves yet; beyond it the oldest makes room
REPORTS_MAX = (
    4096  # reports waiting; a node that outruns the site is cut off and repeats them when it is back
)

Report = Heartbeat | ExecutorEnded | LeaseEnded

_log = structlog.get_logger("gateway.agents")


class AgentListener(Protocol):
    """What `Leasing` hears about nodes."""

    async def agent_joined(self, node: NodeId, hello: AgentHello) -> None: ...
    async def agent_left(self, node: NodeId) -> None: ...
    async def agent_report(self, node: NodeId, message: Report) -> None: ...


class _Stranger(Exception):
    """The peer is no agent of ours; the words are for our log only."""


class _Connection:
    def __init__(self, node: NodeId, websocket: WebSocket) -> None:
        self.node = node
        self.websocket = websocket
        self.answers: dict[int, asyncio.Future[Done]] = {}
        self.reports: asyncio.Queue[Report] = asyncio.Queue(REPORTS_MAX)

    def fail(self, why: str) -> None:
        for answer in self.answers.values():
            if not answer.done():
                answer.set_exception(errors.SiteUnavailableError(why))
        self.answers.clear()


class AgentHub:
    def __init__(self, join_key: bytes, orphan_s: float, clock: Clock) -> None:
        self._join_key = join_key
        self._orphan_s = orphan_s
        self._clock = clock
        self._connections: dict[NodeId, _Connection] = {}
        self._numbers = 0
        self._strangers: dict[int, WebSocket] = {}  # by identity, oldest first
        self._joined = asyncio.Event()
        self._ready: set[NodeId] = set()
        self._arrivals: dict[NodeId, asyncio.Event] = {}  # of agents that somebody waits for

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset(self._connections)

    async def joined(self, node: NodeId) -> None:
        """Until this agent is here."""
        while node not in self._ready:
            arrival = self._arrivals.setdefault(node, asyncio.Event())
            await arrival.wait()

    async def any_joined(self) -> None:
        """Until the first agent is here."""
        await self._joined.wait()

    async def order(self, node: NodeId, order: Order) -> Done:
        """Send and wait for the answer. Raises the error of a Failed one; SiteUnavailableError when none
        comes.
        """
        connection = self._connections.get(node)
        if connection is None:
            raise errors.SiteUnavailableError(
                f"node {node} has no connected agent; `isthmus nodes` shows which have"
            )
        self._numbers += 1
        numbered = msgspec.structs.replace(order, number=self._numbers)
        message = messages.encode(numbered)  # type: ignore[arg-type]
        if len(message) > messages.MESSAGE_BYTES_MAX:  # the agent would hang up, on everybody
            raise errors.InvalidRequestError(f"{type(order).__name__} of {len(message)} bytes is too large")
        answer: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        connection.answers[numbered.number] = answer
        timeout_s = _timeout_s(numbered)
        try:
            async with asyncio.timeout(timeout_s):
                await connection.websocket.send_bytes(message)
                return await answer
        except TimeoutError as error:
            raise errors.SiteUnavailableError(
                f"node {node} did not answer {type(order).__name__} in {timeout_s:.0f} s"
            ) from error
        except (RuntimeError, WebSocketDisconnect) as error:  # Starlette's words for a closed socket
            raise errors.SiteUnavailableError(f"the agent of node {node} hung up") from error
        finally:
            connection.answers.pop(numbered.number, None)

    async def serve(self, websocket: WebSocket, listener: AgentListener) -> None:
        """One agent's connection, from its first byte to its last."""
        if len(self._strangers) >= STRANGERS_MAX:  # a flood of them must not keep agents out
            await _hang_up(self._strangers.pop(next(iter(self._strangers))), 1013)
        self._strangers[id(websocket)] = websocket
        try:
            await websocket.accept()
            hello = await self._shake_hands(websocket)
        except (_Stranger, WebSocketDisconnect, RuntimeError, TimeoutError) as error:
            metrics.STRANGERS.labels("agent").inc()
            _log.warning("stranger", why=str(error) or type(error).__name__)
            await _hang_up(websocket, 1008)
            return
        finally:
            self._strangers.pop(id(websocket), None)
        await self._serve_agent(websocket, hello, listener)

    async def dismiss(self, node: NodeId) -> None:
        """Have the agent of an allocation that is over end itself."""
        connection = self._connections.get(node)
        if connection is not None:
            await _hang_up(connection.websocket, DISMISSED)

    async def close(self) -> None:
        for connection in list(self._connections.values()):
            await _hang_up(connection.websocket, 1001)

    async def _shake_hands(self, websocket: WebSocket) -> AgentHello:
        nonce = secrets.token_bytes(32)
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            await websocket.send_bytes(messages.encode(messages.Challenge(nonce=nonce)))
            hello = _read(await websocket.receive(), HELLO_BYTES_MAX)
        if not isinstance(hello, AgentHello):
            raise _Stranger(f"said {type(hello).__name__} before AgentHello")
        key = tokens.agent_key(self._join_key, key_holder(hello.node))
        proof = hmac.digest(key, b"agent" + nonce + hello.nonce, hashlib.sha256)
        if not hmac.compare_digest(proof, hello.proof):
            raise _Stranger(f"does not hold the key of agent {hello.node!r}")
        answer = hmac.digest(key, b"site" + hello.nonce + nonce, hashlib.sha256)
        await websocket.send_bytes(messages.encode(messages.SiteHello(proof=answer, orphan_s=self._orphan_s)))
        return hello

    async def _serve_agent(self, websocket: WebSocket, hello: AgentHello, listener: AgentListener) -> None:
        node = hello.node
        connection = _Connection(node, websocket)
        older = self._connections.get(node)
        self._connections[node] = connection
        if older is not None:
            older.fail(f"node {node} connected anew")
            await _hang_up(older.websocket, 1012)
        _log.info(
            "agent joined", node=node, pid=hello.pid, hostname=hello.hostname, running=len(hello.running)
        )
        ahead_s = hello.now_s - self._clock.now()
        if hello.now_s and abs(ahead_s) > CLOCKS_DIFFER_S:
            _log.warning("clocks differ", node=node, node_ahead_s=round(ahead_s, 1))
        reporting = asyncio.create_task(
            self._report(connection, hello, listener), name=f"agents.report {node}"
        )
        try:
            await self._listen(connection)
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
            connection.fail(f"the agent of node {node} left")
            if self._connections.get(node) is connection:
                del self._connections[node]
                self._ready.discard(node)
                _log.info("agent left", node=node)
                await listener.agent_left(node)

    async def _report(self, connection: _Connection, hello: AgentHello, listener: AgentListener) -> None:
        try:
            await listener.agent_joined(connection.node, hello)
            self._joined.set()
            self._ready.add(connection.node)
            if connection.node in self._arrivals:
                self._arrivals.pop(connection.node).set()
            while True:
                await listener.agent_report(connection.node, await connection.reports.get())
        except errors.NotFoundError as error:
            _log.warning("agent dismissed", node=connection.node, why=str(error))
            await _hang_up(connection.websocket, DISMISSED)
        except Exception:  # a task boundary: the agent is cut off and repeats its reports when it is back
            _log.exception("report failed", node=connection.node)
            await _hang_up(connection.websocket, 1011)
            raise

    async def _listen(self, connection: _Connection) -> None:
        try:
            while True:
                message = _read(await connection.websocket.receive(), messages.MESSAGE_BYTES_MAX)
                self._accept(connection, message)
        except WebSocketDisconnect:
            return
        except (_Stranger, RuntimeError) as error:  # RuntimeError: Starlette's word for a socket we closed
            _log.warning("agent cut off", node=connection.node, why=str(error))
            await _hang_up(connection.websocket, 1008)

    def _accept(self, connection: _Connection, message: messages.AnyMessage) -> None:
        match message:
            case Done():
                answer = connection.answers.get(message.number)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case Failed():
                answer = connection.answers.get(message.number)
                if answer is not None and not answer.done():
                    answer.set_exception(typed_error(message.code, message.message))
            case Heartbeat() | ExecutorEnded() | LeaseEnded():
                try:
                    connection.reports.put_nowait(message)
                except asyncio.QueueFull as error:
                    raise _Stranger(f"{REPORTS_MAX} reports are waiting") from error
            case _:
                raise _Stranger(f"an agent does not say {type(message).__name__}")


def typed_error(code: str, message: str) -> errors.IsthmusError:
    """The error of our tree with this class name; an unknown name becomes the root, which keeps the words."""
    kind = getattr(errors, code, None)
    if isinstance(kind, type) and issubclass(kind, errors.IsthmusError):
        return kind(message)
    return errors.IsthmusError(f"{code}: {message}")


def _timeout_s(order: Order) -> float:
    environment = getattr(order, "environment", None)
    return BUILD_TIMEOUT_S if environment is not None and environment.requirements else ORDER_TIMEOUT_S


def _read(event: object, limit_bytes: int) -> messages.AnyMessage:
    """One message of a WebSocket event. Raises _Stranger, or WebSocketDisconnect at its end."""
    assert isinstance(event, dict)
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(event.get("code", 1006), event.get("reason"))
    data = event.get("bytes")
    if data is None or len(data) > limit_bytes:
        raise _Stranger(
            "text" if data is None else f"{len(data)} bytes, at most {limit_bytes} are accepted here"
        )
    try:
        return messages.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _Stranger(f"bytes that are no message: {error}") from error


async def _hang_up(websocket: WebSocket, code: int) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it was closed already
        await websocket.close(code)
