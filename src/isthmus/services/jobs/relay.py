"""Carry durable calls to executors over the fabric: opaque bytes there, opaque bytes back.

One worker thread owns one fabric domain, because one thread drives a domain's progress; everything reaches it
as a command, and answers come back as asyncio futures. The domain is opened by the first call and the thread
sleeps while no channel is open, so that a site without durable calls pays nothing.

An executor runs a tenant's code, so the site trusts nothing it says: it speaks to it by plain sockets only,
whatever the fabric of the node is (UCX believes what a peer's messages contain), and takes answers up to a
limit.

Invariant: nothing here decodes a payload. Not here: leases (`slots.py`) and what an answer means (`jobs.py`).
"""

import asyncio
import collections
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import structlog

from isthmus.core.errors import CallError, FabricError, IsthmusError, PeerLostError
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric.channels import Channel, Frame
from isthmus.fabric.frames import Hello, Kind, Welcome
from isthmus.fabric.sockets import MALFORMED, SocketDomain
from isthmus.fabric.streams import Ends

CONNECT_TIMEOUT_S = 5.0
GREETERS_MAX = 16  # executors greeted at once; each may keep one waiting for CONNECT_TIMEOUT_S
_POLL_S = 5.0  # commands wake the domain, so this only bounds a lost wake-up
_RETRY_SEND_S = 0.002

_log = structlog.get_logger("services.jobs.relay")


class Answer(NamedTuple):
    """The frame that ended a call."""

    kind: int
    meta: bytes
    data: bytes


class Question(NamedTuple):
    """One call as it goes on the wire. `define`: also ship the function first (once per channel)."""

    channel_id: int
    call_id: int
    function_id: int
    define: tuple[bytes, bytes] | None  # header, code
    meta: bytes
    data: bytes
    deadline_ns: int


Greeted = tuple[socket.socket, Ends, Welcome]
_Pending = dict[tuple[int, int], asyncio.Future[Answer]]


class Relay:
    """`result_bytes_max`: an answer with more data fails its call. `on_lost` is called in the event loop with
    the id of a channel whose executor is gone.
    """

    def __init__(self, result_bytes_max: int) -> None:
        self.on_lost: Callable[[int], None] = lambda channel_id: None
        self._result_bytes_max = result_bytes_max
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._unsent: collections.deque[Question] = collections.deque()
        self._pending: _Pending = {}
        self._channels: dict[int, Channel] = {}
        self._domain: SocketDomain | None = None
        self._greeters = ThreadPoolExecutor(GREETERS_MAX, "services.jobs.greeter")
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def connect(self, address: str, token: str) -> int:
        """Open a channel; gives its id. Raises FabricError or TokenError.

        Nobody else waits for an executor that does not answer: it is greeted in a thread of its own.
        """
        if self._domain is None:
            self._domain = SocketDomain(self._result_bytes_max)
        hello = Hello(token=token, python=python_version(), isthmus=ISTHMUS_VERSION)
        greeting = self._greeters.submit(self._domain.greet, address, hello, CONNECT_TIMEOUT_S)
        try:
            greeted = await asyncio.shield(asyncio.wrap_future(greeting))
        except asyncio.CancelledError:
            greeting.add_done_callback(_hang_up)
            raise
        return await self._ask(lambda: self._adopt(greeted))

    def call(self, question: Question) -> asyncio.Future[Answer]:
        """The answer to come; PeerLostError when the executor is gone, CallError when it is no answer."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._command(lambda: self._send(question, answer))
        return answer

    def cancel(self, channel_id: int, call_id: int, why: bytes) -> None:
        """Interrupt a call: `why` is b"cancel" or b"timeout". Its answer still comes."""
        self._command(lambda: self._cancel(channel_id, call_id, why))

    def disconnect(self, channel_id: int) -> None:
        self._command(lambda: self._disconnect(channel_id))

    async def close(self) -> None:
        if self._thread is not None:
            self._command(None)
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._greeters.shutdown)
        if self._domain is not None:  # not before: `_command` may be waking it
            self._domain.close()

    # in the event loop
    # ------------------------------------------------------------------------------------------
    async def _ask(self, act: Callable[[], int]) -> int:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def attempt() -> None:
            try:
                self._resolve(answer, act())
            except (IsthmusError, OSError) as error:
                self._resolve(answer, error)

        self._command(attempt)
        return await answer

    def _command(self, command: Callable[[], None] | None) -> None:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="services.jobs.relay", daemon=True)
            self._thread.start()
        self._commands.put(command)
        if self._domain is not None:
            self._domain.wake()

    # in the worker thread
    # ---------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while self._obey():
                if self._channels:
                    assert self._domain is not None
                    frame = self._domain.poll(_RETRY_SEND_S if self._unsent else _POLL_S)
                    if frame is not None:
                        self._dispatch(frame)
                    self._flush()
        except Exception:  # a task boundary: whoever waits must hear of it
            _log.exception("relay failed")
            raise
        finally:
            for answer in self._pending.values():
                self._resolve(answer, PeerLostError("the relay of durable calls stopped"))

    def _obey(self) -> bool:
        """Carry out waiting commands; without channels, wait for one. False: the end."""
        block = not self._channels
        while True:
            try:
                command = self._commands.get(block=block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = block and not self._channels

    def _adopt(self, greeted: Greeted) -> int:
        assert self._domain is not None
        channel = self._domain.adopt(*greeted)
        self._channels[channel.id] = channel
        return channel.id

    def _send(self, question: Question, answer: asyncio.Future[Answer]) -> None:
        if question.channel_id not in self._channels:
            self._resolve(answer, PeerLostError("the channel is closed"))
            return
        self._pending[question.channel_id, question.call_id] = answer
        self._unsent.append(question)
        self._flush()

    def _flush(self) -> None:
        """Send what waits, in order on each channel; one that has no room holds up no other."""
        waiting, self._unsent = self._unsent, collections.deque()
        full: set[int] = set()
        for question in waiting:
            if question.channel_id in full or not self._transmit(question):
                full.add(question.channel_id)
                self._unsent.append(question)

    def _transmit(self, question: Question) -> bool:
        """False: no room now."""
        channel = self._channels.get(question.channel_id)
        if channel is None:
            return True  # who asked has been told
        try:
            return _transmit(channel, question)
        except FabricError as error:
            self._fail(question.channel_id, str(error))
            return True

    def _dispatch(self, frame: Frame) -> None:
        if frame.kind == Kind.LOST:
            self._fail(frame.channel_id, frame.meta.decode("utf-8", "replace"))
        elif frame.kind in (Kind.RESULT, Kind.ERROR, Kind.REFUSED):
            answer = self._pending.pop((frame.channel_id, frame.call_id), None)
            if answer is not None:
                data = b"" if frame.data is None else bytes(frame.data)
                self._resolve(answer, Answer(frame.kind, bytes(frame.meta), data))

    def _cancel(self, channel_id: int, call_id: int, why: bytes) -> None:
        channel = self._channels.get(channel_id)
        if channel is None or (channel_id, call_id) not in self._pending:
            return
        try:
            channel.send_urgent(Kind.CANCEL, call_id, why)
        except FabricError as error:
            self._fail(channel_id, str(error))

    def _disconnect(self, channel_id: int) -> None:
        channel = self._channels.pop(channel_id, None)
        if channel is not None:
            channel.close()
            self._forget(channel_id, "the channel was closed")

    def _fail(self, channel_id: int, why: str) -> None:
        channel = self._channels.pop(channel_id, None)
        if channel is None:
            return
        channel.close()
        self._forget(channel_id, why)
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.on_lost, channel_id)

    def _forget(self, channel_id: int, why: str) -> None:
        error: IsthmusError = PeerLostError(f"the executor is gone: {why}")
        if why.startswith(MALFORMED):  # again elsewhere, it would answer the same
            error = CallError(f"the answer cannot be taken: {why}; write large results to a file")
        for pending in [key for key in self._pending if key[0] == channel_id]:
            self._resolve(self._pending.pop(pending), error)

    def _resolve(self, future: asyncio.Future[Any], outcome: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_settle, future, outcome)


def _hang_up(greeting: Future[Greeted]) -> None:
    """On an executor that was greeted for nobody."""
    if not greeting.cancelled() and greeting.exception() is None:
        greeting.result()[0].close()


def _transmit(channel: Channel, question: Question) -> bool:
    """DEFINE if needed, then CALL. False: no room; sending both again later does no harm (DEFINE is
    idempotent).
    """
    if question.define is not None:
        header, code = question.define
        if not channel.send(Kind.DEFINE, 0, question.function_id, header, [code]):
            return False
    data = [question.data] if question.data else []
    return channel.send(
        Kind.CALL, question.call_id, question.function_id, question.meta, data, question.deadline_ns
    )


def _settle(future: asyncio.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
