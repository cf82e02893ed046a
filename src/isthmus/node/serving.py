"""The executor's main loop: frames in, calls run in order of arrival, frames out.

Invariant: every admitted CALL gets exactly one RESULT, ERROR or REFUSED, unless its client is gone or this
process dies. User code runs in the main thread only, and only while the page's `running` word is 1: that word
is what allows the signal handler to raise in it.

The path of a plain function is written out in `_call` without indirection: what stands between `poll` and
`send` is what isthmus adds to a call.
Not here: kinds of functions (`functions.py`), generators (`streams.py`), process set-up (`executor.py`).
"""

import os
import sys
from asyncio import CancelledError
from collections import OrderedDict, deque
from collections.abc import Callable
from time import monotonic_ns
from types import FrameType
from typing import Any, NoReturn

from isthmus.core.errors import (
    CodecError,
    EvictedError,
    FunctionLoadError,
    InvalidRequestError,
    PeerLostError,
)
from isthmus.fabric.channels import Channel, Domain, Frame
from isthmus.fabric.codec import (
    Encoded,
    FunctionHeader,
    decode_call,
    decode_header,
    encode_error,
    encode_value,
    pack_value,
)
from isthmus.fabric.frames import Kind
from isthmus.node.functions import Function, Loop, is_stream
from isthmus.node.interruption import CallInterrupted, Reason, Terminated, answer, reason_of
from isthmus.node.page import BUSY, CALLS, CLIENTS, DRAINING, ERRORS, LAST, LAST_CALL, RUNNING, Page
from isthmus.node.streams import Items, Window, send_all

FUNCTIONS_MAX = 4096  # per client: a table index is cheap, but not free
CANCELS_MAX = 4096  # cancels of calls that have not been met yet; beyond it the oldest is forgotten
IDLE_S = 3600.0  # one sleep of an idle executor; anything that matters wakes it
_LONG_CALL_NS = 1_000_000  # after a call this long, cancels are read before the next call

_CALL, _RESULT, _ERROR = int(Kind.CALL), int(Kind.RESULT), int(Kind.ERROR)
_OWN_FRAMES = ("isthmus.node.", "isthmus.fabric.", "asyncio.")


class Client:
    """One connected client and its function table."""

    __slots__ = ("channel", "functions", "send")

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.send = channel.send
        self.functions: dict[int, Function] = {}


class Server:
    """Serves one lease's calls on one domain until `stop` or an exit. `leave(code)` ends the process."""

    def __init__(self, domain: Domain, page: Page, spin_s: float, leave: Callable[[int], None]) -> None:
        self._domain = domain
        self._page = page
        self._words = page.words
        self._spin_s = spin_s
        self._leave = leave
        self._loop = Loop()
        self._clients: dict[int, Client] = {}
        self._inbox: deque[Frame] = deque()
        self._cancels: OrderedDict[tuple[int, int], Reason] = OrderedDict()
        self._frame: Frame | None = None  # the call that runs now
        self._window: Window | None = None  # ... and its stream's credit
        self._interrupt: Reason | None = None  # why it must stop
        self._signalled = False  # a signal came while no user code ran
        self._terminated = False
        self.forked = False  # set in a child that user code forked

    # the loop -----------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Serve until SIGTERM. Raises Terminated."""
        poll, inbox, spin_s = self._domain.poll, self._inbox, self._spin_s
        while not self._terminated:
            frame = inbox.popleft() if inbox else poll(IDLE_S, spin_s)
            if frame is None:
                continue
            if frame[1] == _CALL:
                self._call(frame)
            else:
                self._control(frame)
        raise Terminated

    def close(self) -> None:
        """Run what actors left to do, in order of their making."""
        for client in self._clients.values():
            _leave_all(client)
        self._clients.clear()
        self._loop.close()

    def terminate(self) -> None:
        """From the SIGTERM handler: stop now if user code runs, else after the current step."""
        self._terminated = True
        if self._words[RUNNING]:
            raise Terminated
        self._domain.wake()

    # a call -------------------------------------------------------------------------------------------------
    def _call(self, frame: Frame) -> None:
        channel_id, _, call_id, function_id, _, _, _, meta, data = frame
        words = self._words
        try:
            client = self._clients[channel_id]
            function = client.functions[function_id]
        except KeyError:
            self._call_unknown(frame)
            return
        if words[DRAINING] or self._cancels:
            refusal = self._refusal(frame)
            if refusal is not None:
                self._send(client, *refusal, frame)
                return
        target = function.target
        if target is None:
            self._call_other(client, function, frame)
            return
        self._frame = frame
        row = function.row
        started_ns = monotonic_ns()
        try:
            try:
                words[RUNNING] = 1
                if self._signalled:
                    self._heed()
                args, kwargs = decode_call(meta, data)
                result = target(*args, **kwargs)
            finally:
                if self.forked:
                    _end_child()
                words[RUNNING] = 0
            meta, buffers = pack_value(result)
            kind = _RESULT
        except BaseException as error:
            kind, (meta, buffers) = _ERROR, self._failure(error)
            words[row + ERRORS] += 1
        ended_ns = monotonic_ns()
        self._frame = None
        try:
            if not client.send(kind, call_id, function_id, meta, buffers):
                self._send(client, kind, Encoded(meta, buffers), frame)
        except PeerLostError:
            pass  # its LOST frame follows
        words[row] += 1  # counted while the answer is under way
        words[row + BUSY] += ended_ns - started_ns
        words[row + LAST] = words[LAST_CALL] = ended_ns
        if ended_ns - started_ns > _LONG_CALL_NS:
            self._drain_domain()

    def _call_other(self, client: Client, function: Function, frame: Frame) -> None:
        """A call of a function not loaded yet, or of any other kind than a plain function."""
        words, row = self._words, function.row
        self._frame = frame
        started_ns = monotonic_ns()
        try:
            args, kwargs = decode_call(frame.meta, frame.data)
            result = self._guard(function.invoke, *args, **kwargs)
            if function.streams and is_stream(result):
                result = self._stream(client, Items(result, self._loop), frame)
            kind, encoded = _RESULT, encode_value(result)
        except BaseException as error:
            kind, encoded = _ERROR, self._failure(error)
            words[row + ERRORS] += 1
        ended_ns = monotonic_ns()
        words[row + CALLS] += 1
        words[row + BUSY] += ended_ns - started_ns
        words[row + LAST] = words[LAST_CALL] = ended_ns
        self._frame = None
        self._send(client, kind, encoded, frame)
        self._drain_domain()

    def _guard(self, code: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run user code so that signals may interrupt it."""
        try:
            self._words[RUNNING] = 1
            if self._signalled:
                self._heed()
            return code(*args, **kwargs)
        finally:
            if self.forked:
                _end_child()
            self._words[RUNNING] = 0

    def _stream(self, client: Client, items: Items, frame: Frame) -> Any:
        self._window = Window(frame.credits)
        try:
            return send_all(
                items,
                self._window,
                self._guard,
                lambda item: self._send(client, Kind.YIELD, encode_value(item), frame),
                self._wait,
            )
        finally:
            self._window = None

    def _wait(self) -> None:
        frame = self._domain.poll(IDLE_S)
        if frame is not None:
            self._receive(frame)
        if self._terminated:
            raise Terminated
        self._raise_interrupt()

    def _refusal(self, frame: Frame) -> tuple[int, Encoded] | None:
        """Why this call is not run at all, if so."""
        reason = self._cancels.pop((frame.channel_id, frame.call_id), None)
        if reason is not None:
            return _ERROR, encode_error(answer(reason, running=False))
        if self._words[DRAINING]:
            return Kind.REFUSED, encode_error(
                EvictedError("the lease is being taken back; call again elsewhere")
            )
        return None

    def _call_unknown(self, frame: Frame) -> None:
        client = self._client(frame.channel_id)
        if client is None:
            return
        if frame.function_id in client.functions:
            self._call(frame)
            return
        error = FunctionLoadError(f"no function {frame.function_id} was defined on this channel")
        self._send(client, _ERROR, encode_error(error), frame)

    def _failure(self, error: BaseException) -> Encoded:
        """How the end of a call by an exception travels; exits the process for those that mean it."""
        interrupt, self._interrupt = self._interrupt, None
        if isinstance(error, SystemExit):
            self._leave(exit_code(error))
        if isinstance(error, Terminated):
            self._leave(0)
        if isinstance(error, CallInterrupted):
            return encode_error(answer(error.reason, running=True))
        if interrupt is not None and isinstance(error, CancelledError):
            return encode_error(answer(interrupt, running=True))
        _trim(error)
        return encode_error(error)

    def _send(self, client: Client, kind: int, encoded: Encoded, frame: Frame) -> None:
        """Send, however long the peer takes to make room; frames that come meanwhile are kept."""
        try:
            while not client.send(kind, frame.call_id, frame.function_id, encoded.meta, encoded.data):
                came = self._domain.poll(0.1)
                if came is not None:
                    self._receive(came)
        except PeerLostError:
            return

    # everything else that arrives ---------------------------------------------------------------------------
    def on_signal(self, _number: int, _stack: FrameType | None) -> None:
        """The handler of the signal that announces bytes on a bootstrap socket."""
        if self._words[RUNNING]:
            self._heed()
        else:
            self._signalled = True

    def _heed(self) -> None:
        """Read what has come in while user code runs, and stop that code if it says so."""
        self._signalled = False
        self._drain_domain()
        if self._interrupt is not None and not self._loop.interrupt():
            self._raise_interrupt()

    def _raise_interrupt(self) -> None:
        """Once: the user's clean-up that follows must not be interrupted for the same reason."""
        reason, self._interrupt = self._interrupt, None
        if reason is not None:
            raise CallInterrupted(reason)

    def _drain_domain(self) -> None:
        while (frame := self._domain.poll(0.0)) is not None:
            self._receive(frame)

    def _receive(self, frame: Frame) -> None:
        """Sort a frame that arrived while a call is under way."""
        running = self._frame
        if frame.kind == Kind.CANCEL:
            self._cancel(frame)
        elif running is not None and frame.channel_id == running.channel_id and frame.kind == Kind.YIELD:
            if self._window is not None and frame.call_id == running.call_id:
                self._window.grant(frame.credits)
        else:
            if frame.kind in (Kind.LOST, Kind.GOODBYE):
                self._drop(frame.channel_id)
            self._inbox.append(frame)

    def _drop(self, channel_id: int) -> None:
        """Nobody waits for this client's calls any more."""
        if self._frame is not None and self._frame.channel_id == channel_id:
            self._interrupt = "gone"
        others = [frame for frame in self._inbox if frame.channel_id != channel_id]
        self._inbox.clear()
        self._inbox.extend(others)

    def _cancel(self, frame: Frame) -> None:
        running = self._frame
        reason = reason_of(bytes(frame.meta))
        if running is not None and (running.channel_id, running.call_id) == (frame.channel_id, frame.call_id):
            self._interrupt = reason
            return
        self._cancels[frame.channel_id, frame.call_id] = reason
        if len(self._cancels) > CANCELS_MAX:
            self._cancels.popitem(last=False)

    def _control(self, frame: Frame) -> None:
        if frame.kind == Kind.DEFINE:
            self._define(frame)
        elif frame.kind == Kind.CANCEL:
            self._cancel(frame)
        elif frame.kind in (Kind.GOODBYE, Kind.LOST):
            self._forget(frame.channel_id)

    def _define(self, frame: Frame) -> None:
        client = self._client(frame.channel_id)
        if client is None:
            return
        try:
            header = decode_header(frame.meta)
            if len(client.functions) >= FUNCTIONS_MAX:
                raise InvalidRequestError(f"a client may define {FUNCTIONS_MAX} functions")
        except (CodecError, InvalidRequestError) as error:
            print(f"isthmus: ignored a function definition: {error}", file=sys.stderr)
            return
        if header.kind == "native":
            self._define_native(client, frame, header)
            return
        code = frame.data if frame.data is not None else b""
        row = self._page.add_row(header.name)
        if (former := client.functions.get(frame.function_id)) is not None:
            former.leave()
        client.functions[frame.function_id] = Function(header, code, row, self._loop)

    def _define_native(self, client: Client, frame: Frame, header: FunctionHeader) -> None:
        try:
            self._domain.define_native(
                frame.channel_id, frame.function_id, header.library, header.symbol, header.result_bytes_max
            )
        except FunctionLoadError as error:
            row = self._page.add_row(header.name)
            client.functions[frame.function_id] = Function.broken(header, error, row, self._loop)

    def _client(self, channel_id: int) -> Client | None:
        """The client behind a channel, met on its first frame."""
        client = self._clients.get(channel_id)
        if client is None:
            channel = self._domain.channel(channel_id)
            if channel is None:
                return None
            client = self._clients[channel_id] = Client(channel)
            self._words[CLIENTS] = len(self._clients)
        return client

    def _forget(self, channel_id: int) -> None:
        client = self._clients.pop(channel_id, None)
        if client is not None:
            _leave_all(client)
        channel = self._domain.channel(channel_id)
        if channel is not None:
            channel.close()
        for key in [key for key in self._cancels if key[0] == channel_id]:
            del self._cancels[key]
        self._words[CLIENTS] = len(self._clients)


def _end_child() -> NoReturn:
    """End a process that user code forked and that comes back from that code: its parent answers the call."""
    error = sys.exc_info()[1]
    code = 0
    if isinstance(error, SystemExit):
        code = exit_code(error)
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(error: SystemExit) -> int:
    """What the interpreter would exit with."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _trim(error: BaseException) -> None:
    """Drop our own frames from the head of the traceback: the user's code is what the reader looks for."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(_OWN_FRAMES):
        trace = trace.tb_next
    error.__traceback__ = trace


def _leave_all(client: Client) -> None:
    for function in client.functions.values():
        function.leave()
