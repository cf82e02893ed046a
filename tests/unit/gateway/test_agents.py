"""The agents' endpoint, spoken to by tiny peers over real WebSockets."""

import asyncio
import hashlib
import hmac
import secrets
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from structlog.testing import capture_logs
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from isthmus.core import tokens
from isthmus.core.clock import SystemClock
from isthmus.core.errors import InvalidRequestError, IsthmusError, NoCapacityError, SiteUnavailableError
from isthmus.core.ids import LeaseId, NodeId
from isthmus.core.model import EndReason, Enforcement, Usage
from isthmus.core.settings import GatewaySettings
from isthmus.gateway import agents, http
from isthmus.gateway.agents import AgentHub, typed_error
from isthmus.node import messages
from isthmus.node.messages import AddExecutor, Done, EndLease, Failed, Heartbeat, LeaseEnded

JOIN_KEY = b"j" * 32
NODE = NodeId("n1")
LEASE = LeaseId("ls_1")
NOW_S = 1e9  # of the site's clock, which stands still


class StoppedClock(SystemClock):
    def now(self):
        return NOW_S


class Listener:
    """Notes what it hears; `on_report` may do more, like giving orders."""

    def __init__(self):
        self.heard = []
        self.changed = asyncio.Event()
        self.on_report = None

    def _note(self, *event):
        self.heard.append(event)
        self.changed.set()

    async def agent_joined(self, node, hello):
        self._note("joined", node, hello.pid)

    async def agent_left(self, node):
        self._note("left", node)

    async def agent_report(self, node, message):
        if self.on_report is not None:
            await self.on_report(node, message)
        self._note("report", message)

    async def until(self, count):
        async with asyncio.timeout(10):
            while len(self.heard) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.heard


@asynccontextmanager
async def serving():
    hub, listener = AgentHub(JOIN_KEY, 5.0, StoppedClock()), Listener()

    async def endpoint(websocket):
        await hub.serve(websocket, listener)

    settings = GatewaySettings()
    with http.listen(settings, 0) as socket:
        url = http.url_of(settings, socket).replace("http", "ws") + "/agent"
        server = http.Server(Starlette(routes=[WebSocketRoute("/agent", endpoint)]))
        task = asyncio.create_task(server.serve(sockets=[socket]))
        try:
            yield hub, listener, url
        finally:
            await hub.close()
            server.stop()
            await task


@asynccontextmanager
async def agent(url, pid=1, key=JOIN_KEY, of=NODE, ahead_s=0.0):
    """A connection that has shaken hands. of: whose key it holds; ahead_s: of its clock."""
    async with connect(url) as websocket:
        challenge = messages.decode(await websocket.recv())
        nonce = secrets.token_bytes(32)
        key = tokens.agent_key(key, of)
        proof = hmac.digest(key, b"agent" + challenge.nonce + nonce, hashlib.sha256)
        hello = messages.AgentHello(
            node=NODE, nonce=nonce, proof=proof, version="0", python="cpython-3.11", hostname="h", pid=pid,
            cores=2, memory_bytes=2**30, gpus=0, enforcement=Enforcement(), now_s=NOW_S + ahead_s,
        )  # fmt: skip
        await websocket.send(messages.encode(hello))
        answer = messages.decode(await websocket.recv())
        expected = hmac.digest(key, b"site" + nonce + challenge.nonce, hashlib.sha256)
        assert answer == messages.SiteHello(proof=expected, orphan_s=5.0)
        yield websocket


async def receive(websocket):
    async with asyncio.timeout(10):
        return messages.decode(await websocket.recv())


def ended(number):
    return LeaseEnded(lease=LeaseId(f"ls_{number}"), reason=EndReason.EXITED, detail="", usage=Usage())


@pytest.mark.parametrize(("ahead_s", "told"), [(5.1, True), (-5.1, True), (4.9, False)])
def test_a_node_whose_clock_differs_is_told_of_when_it_joins(ahead_s, told):
    async def scenario():
        async with serving() as (_hub, listener, url), agent(url, ahead_s=ahead_s):
            await listener.until(1)

    with capture_logs() as logs:
        asyncio.run(scenario())
    assert ("clocks differ" in [line["event"] for line in logs]) == told


def test_an_order_reaches_its_agent_and_its_answer_comes_back():
    async def scenario():
        async with serving() as (hub, listener, url), agent(url, pid=7) as websocket:
            assert await listener.until(1) == [("joined", NODE, 7)]
            ordering = asyncio.create_task(hub.order(NODE, AddExecutor(number=0, lease=LEASE)))
            order = await receive(websocket)
            assert (type(order), order.lease) == (AddExecutor, LEASE)
            await websocket.send(messages.encode(Done(number=order.number, text="made")))
            assert (await ordering).text == "made"

    asyncio.run(scenario())


def test_answers_may_come_in_any_order_and_failures_are_typed():
    async def scenario():
        async with serving() as (hub, listener, url), agent(url) as websocket:
            await listener.until(1)
            first = asyncio.create_task(hub.order(NODE, AddExecutor(number=0, lease=LEASE)))
            second = asyncio.create_task(
                hub.order(NODE, EndLease(number=0, lease=LEASE, reason=EndReason.IDLE))
            )
            orders = {type(order): order for order in (await receive(websocket), await receive(websocket))}
            assert orders[AddExecutor].number != orders[EndLease].number
            await websocket.send(messages.encode(Done(number=orders[EndLease].number)))
            await second
            failed = Failed(number=orders[AddExecutor].number, code="NoCapacityError", message="no memory")
            await websocket.send(messages.encode(failed))
            with pytest.raises(NoCapacityError, match="no memory"):
                await first

    asyncio.run(scenario())


def test_an_order_that_no_message_holds_does_not_cost_the_agent_its_line():
    async def scenario():
        async with serving() as (hub, listener, url), agent(url) as websocket:
            await listener.until(1)
            with pytest.raises(InvalidRequestError, match="too large"):
                await hub.order(NODE, AddExecutor(number=0, lease=LeaseId("x" * messages.MESSAGE_BYTES_MAX)))
            order = asyncio.create_task(hub.order(NODE, AddExecutor(number=0, lease=LEASE)))
            await websocket.send(messages.encode(Done(number=(await receive(websocket)).number)))
            await order

    asyncio.run(scenario())


def test_an_order_to_a_node_without_agent_fails_at_once():
    async def scenario():
        async with serving() as (hub, _, _):
            with pytest.raises(SiteUnavailableError, match="no connected agent"):
                await hub.order(NODE, AddExecutor(number=0, lease=LEASE))

    asyncio.run(scenario())


def test_an_agent_that_leaves_fails_its_open_orders_and_is_reported():
    async def scenario():
        async with serving() as (hub, listener, url):
            async with agent(url) as websocket:
                await listener.until(1)
                ordering = asyncio.create_task(hub.order(NODE, AddExecutor(number=0, lease=LEASE)))
                await receive(websocket)
            with pytest.raises(SiteUnavailableError):
                await ordering
            assert (await listener.until(2))[-1] == ("left", NODE)
            assert hub.nodes == frozenset()

    asyncio.run(scenario())


def test_a_silent_agent_is_given_up_on(monkeypatch):
    monkeypatch.setattr(agents, "ORDER_TIMEOUT_S", 0.1)

    async def scenario():
        async with serving() as (hub, listener, url), agent(url):
            await listener.until(1)
            with pytest.raises(SiteUnavailableError, match="did not answer AddExecutor"):
                await hub.order(NODE, AddExecutor(number=0, lease=LEASE))

    asyncio.run(scenario())


def test_a_newer_connection_of_a_node_replaces_the_older_without_a_farewell():
    async def scenario():
        async with serving() as (hub, listener, url), agent(url, pid=1) as older:
            await listener.until(1)
            async with agent(url, pid=2) as newer:
                await listener.until(2)
                with pytest.raises(ConnectionClosed):
                    await older.recv()
                ordering = asyncio.create_task(hub.order(NODE, AddExecutor(number=0, lease=LEASE)))
                order = await receive(newer)
                await newer.send(messages.encode(Done(number=order.number)))
                await ordering
                assert [event[0] for event in listener.heard] == ["joined", "joined"]
            assert (await listener.until(3))[-1] == ("left", NODE)

    asyncio.run(scenario())


def test_reports_are_heard_in_order_and_may_lead_to_orders():
    async def scenario():
        async with serving() as (hub, listener, url), agent(url) as websocket:
            await listener.until(1)

            async def give_order(node, message):
                if message == ended(0):
                    await hub.order(node, AddExecutor(number=0, lease=LEASE))

            listener.on_report = give_order
            for number in range(20):
                await websocket.send(messages.encode(ended(number)))
            await websocket.send(messages.encode(Heartbeat(leases=())))
            order = await receive(websocket)
            assert len(listener.heard) == 1  # the first report is still being handled
            await websocket.send(messages.encode(Done(number=order.number)))
            heard = await listener.until(22)
            assert [event[1] for event in heard[1:21]] == [ended(number) for number in range(20)]

    asyncio.run(scenario())


@pytest.mark.parametrize("key", [b"x" * 32, b""], ids=["another", "empty"])
def test_an_agent_with_a_wrong_join_key_is_turned_away(key):
    async def scenario():
        async with serving() as (hub, listener, url):
            with pytest.raises(ConnectionClosed):
                async with agent(url, key=key):
                    pass
            assert (hub.nodes, listener.heard) == (frozenset(), [])

    asyncio.run(scenario())


def test_an_agent_cannot_speak_for_another_node():
    async def scenario():
        async with serving() as (hub, listener, url):
            with pytest.raises(ConnectionClosed):
                async with agent(url, of=NodeId("another")):
                    pass
            assert (hub.nodes, listener.heard) == (frozenset(), [])

    asyncio.run(scenario())


def test_an_agent_that_is_dismissed_hears_so():
    async def scenario():
        async with serving() as (hub, listener, url), agent(url) as websocket:
            await listener.until(1)
            await hub.dismiss(NODE)
            await hub.dismiss(NodeId("nobody"))
            with pytest.raises(ConnectionClosed) as closed:
                await websocket.recv()
            assert closed.value.rcvd.code == messages.DISMISSED

    asyncio.run(scenario())


def test_a_replayed_hello_is_worth_nothing():
    async def scenario():
        async with serving() as (hub, listener, url):
            async with connect(url) as first:
                nonce = messages.decode(await first.recv()).nonce
                key = tokens.agent_key(JOIN_KEY, NODE)
                proof = hmac.digest(key, b"agent" + nonce + b"n" * 32, hashlib.sha256)
                hello = messages.AgentHello(
                    node=NODE, nonce=b"n" * 32, proof=proof, version="0", python="p", hostname="h", pid=1,
                    cores=1, memory_bytes=1, gpus=0, enforcement=Enforcement(),
                )  # fmt: skip
                await first.send(messages.encode(hello))
                await first.recv()
            await listener.until(2)
            async with connect(url) as again:
                await again.recv()
                await again.send(messages.encode(hello))
                with pytest.raises(ConnectionClosed):
                    await again.recv()
            assert hub.nodes == frozenset()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "message",
    [b"", b"\xff", "text", messages.encode(Done(number=1)), messages.encode(Heartbeat(leases=()))],
    ids=repr,
)
def test_who_speaks_before_the_handshake_is_cut_off(message):
    async def scenario():
        async with serving() as (hub, _, url), connect(url) as stranger:
            await stranger.recv()
            await stranger.send(message)
            with pytest.raises(ConnectionClosed):
                await stranger.recv()
            assert hub.nodes == frozenset()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "message", [b"\xff", "text", messages.encode(messages.SiteHello(proof=b"", orphan_s=1.0))], ids=repr
)
def test_an_agent_that_talks_nonsense_is_cut_off_and_reported(message):
    async def scenario():
        async with serving() as (_, listener, url), agent(url) as websocket:
            await listener.until(1)
            await websocket.send(message)
            with pytest.raises(ConnectionClosed):
                await websocket.recv()
            assert (await listener.until(2))[-1] == ("left", NODE)

    asyncio.run(scenario())


def test_a_crowd_of_strangers_does_not_keep_an_agent_out(monkeypatch):
    monkeypatch.setattr(agents, "STRANGERS_MAX", 3)
    monkeypatch.setattr(agents, "HELLO_TIMEOUT_S", 60.0)

    async def scenario():
        async with serving() as (_, listener, url):
            strangers = [await connect(url) for _ in range(10)]
            async with agent(url, pid=7):
                assert await listener.until(1) == [("joined", NODE, 7)]
            for stranger in strangers[:7]:
                await stranger.recv()  # the challenge
                with pytest.raises(ConnectionClosed):
                    await receive(stranger)
            for stranger in strangers:
                await stranger.close()

    asyncio.run(scenario())


def test_who_says_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(agents, "HELLO_TIMEOUT_S", 0.1)

    async def scenario():
        async with serving() as (_, _, url), connect(url) as stranger:
            await stranger.recv()
            with pytest.raises(ConnectionClosed):
                await stranger.recv()

    asyncio.run(scenario())


@pytest.mark.parametrize("code", ["Nonsense", "Exception", "ClassVar", ""])
def test_an_unknown_failure_becomes_the_root_with_its_words(code):
    error = typed_error(code, "what happened")
    assert type(error) is IsthmusError
    assert "what happened" in str(error)
