"""What a stranger may cost the site's HTTP port, over real sockets."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from isthmus.core.settings import GatewaySettings
from isthmus.gateway import connections, http

MEBIBYTE = 2**20
CLOSED_S = 20.0


async def count_body(request):
    size_bytes = 0
    async for piece in request.stream():
        size_bytes += len(piece)
    return PlainTextResponse(str(size_bytes))


async def refuse(request):
    return PlainTextResponse("who are you?", status_code=401)


@asynccontextmanager
async def serving():
    """The port of a server that counts bodies at /, and refuses at once at /refused."""
    routes = [Route("/", count_body, methods=["GET", "POST"]), Route("/refused", refuse, methods=["POST"])]
    with http.listen(GatewaySettings(), 0) as listener:
        server = http.Server(Starlette(routes=routes))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.stop()
            await task


async def flood(writer, first: bytes, limit_bytes: int) -> int:
    """Say `first`, then the same letter until the other side hangs up; how much it took."""
    writer.write(first)
    sent_bytes = 0
    try:
        while sent_bytes < limit_bytes:
            writer.write(b"a" * 65536)
            await writer.drain()
            sent_bytes += 65536
    except ConnectionError:
        pass
    return sent_bytes


async def is_cut_off(reader) -> bool:
    async with asyncio.timeout(CLOSED_S):
        try:
            while await reader.read(65536):
                continue
        except ConnectionError:
            pass
        return True


async def ask(port: int, request: bytes) -> bytes:
    """The answer's last line."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    async with asyncio.timeout(CLOSED_S):
        answer = await reader.read()
    writer.close()
    return answer.splitlines()[-1]


GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "first",
    [
        b"GET /",
        b"GET / HTTP/1.1\r\nX-Long: ",
        b"POST /refused HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ",
        b"POST /refused HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;extension=",
    ],
    ids=["line", "header", "trailer", "chunk-extension"],
)
def test_what_never_becomes_a_request_is_cut_off_while_it_is_small(first):
    async def scenario():
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await flood(writer, first, 64 * MEBIBYTE) < 64 * MEBIBYTE
            assert await is_cut_off(reader)
            writer.close()
            assert await ask(port, GET) == b"0"

    asyncio.run(scenario())


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost:", b"\r\n"], ids=["silent", "half", "blank"])
def test_who_never_asks_is_cut_off_in_time(said, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.2)

    async def scenario():
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(said)
            assert await is_cut_off(reader)
            writer.close()

    asyncio.run(scenario())


def test_idle_strangers_make_room_for_who_asks(monkeypatch):
    monkeypatch.setattr(connections, "connections_max", lambda: 8)

    async def scenario():
        async with serving() as port:
            strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
            assert await ask(port, GET) == b"0"
            assert await is_cut_off(strangers[0][0])
            for _, writer in strangers:
                writer.close()

    asyncio.run(scenario())


def test_a_long_body_in_small_pieces_is_taken():
    pieces = b"".join(b"10\r\n" + bytes(16) + b"\r\n" for _ in range(20_000))

    async def scenario():
        async with serving() as port:
            head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert await ask(port, head + pieces + b"0\r\n\r\n") == b"320000"

    asyncio.run(scenario())


def test_a_connection_is_good_for_many_requests(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_BYTES_MAX", 1000)

    async def scenario():
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(30):
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Padding: " + b"p" * 100 + b"\r\n\r\n")
                async with asyncio.timeout(CLOSED_S):
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                    assert await reader.readexactly(1) == b"0"
            writer.close()

    asyncio.run(scenario())
