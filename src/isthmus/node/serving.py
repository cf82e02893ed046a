"""The executor's main loop: frames in, calls run in order of arrival, frames out.

Invariant: every admitted CALL gets exactly one RESULT, ERROR or REFUSED, unless its client is gone or this
process dies. User code runs in the main thread only, and only while the page's `running` word is 1: that word
is what allows the signal handler to raise in it. A call begins when the answers to its client have left: it
makes no progress, and if it ends the process, the client must know which calls had ended.

The path of a plain function is written out in `_call` without indirection: what stands between `poll` and
`send` is what isthmus adds to a call.
Not here: kinds of functions (`functions.py`), generators (`streams.py`), process set-up (`executor.py`).
"""

from asyncio import CancelledError
from collections import deque
from collections.abc import Callable
from time import monotonic_ns
from types import FrameType
from typing import Any

from isthmus.core.errors import (
    EvictedError,
    FunctionLoadError,
    PeerLostError,
)
from isthmus.fabric.channels import Domain, Frame
from isthmus.fabric.codec import (
    Encoded,
    decode_call,
    encode_error,
    encode_value,
    pack_value,
)
from isthmus.fabric.frames import Kind
from isthmus.node.clients import Client, Clients
from isthmus.node.endings import end_child, exit_code, trim
from isthmus.node.functions import Function, Loop, is_stream
from isthmus.node.groups import Switchboard
from isthmus.node.interruption import CallInterrupted, Cancels, Reason, Terminated, answer, reason_of
from isthmus.node.page import BUSY, CALLS, DRAINING, ERRORS, HELD, LAST, RUNNING, Page
from isthmus.node.streams import Items, Window, send_all

IDLE_S = 3600.0  # one sleep of an idle executor; anything that matters wakes it
_LONG_CALL_NS = 1_000_000  # after a call this long, cancels are read before the next call
# First and longest sleep until the next look whether answers have left: no poll ends when they do, so the
# longest is what a call may wait in vain. Shorter costs more of a core while a client reads nothing.
_UNSENT_POLL_S = 20e-6, 0.002

_CALL, _RESULT, _ERROR = int(Kind.CALL), int(Kind.RESULT), int(Kind.ERROR)


class Server:
    """Serves one lease's calls on one domain until `stop` or an exit. `leave(code)` ends the process."""

    def __init__(self, domain: Domain, page: Page, spin_s: float, leave: Callable[[int], None]) -> None:
        self._domain = domain
        self._page = page
        self._words = page.words
        self._spin_s = spin_s
        self._leave = leave
        self._loop = Loop()
        self._board = Switchboard(domain, self._receive, self._heed_note)
        self._clients = Clients(domain, page, self._loop, self._board)
        self._by_channel = self._clients.by_channel
        self._inbox: deque[Frame] = deque()
        self._cancels = Cancels()
        self._held = self._cancels.calls
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
            frame = self._next_kept() if inbox else poll(IDLE_S, spin_s)
            if frame is None:
                continue
            if frame[1] == _CALL:
                self._call(frame)
            else:
                self._control(frame)
        raise Terminated

    def _next_kept(self) -> Frame | None:
        """The oldest kept frame that may go, as soon as there is one. None: the process is to end."""
        sleep_s, sleep_s_max = _UNSENT_POLL_S
        while not self._terminated:
            frame = self._take_kept()
            if frame is not None:
                return frame
            came = self._domain.poll(sleep_s)
            if came is not None:
                self._receive(came)
            sleep_s = min(2 * sleep_s, sleep_s_max)
        return None

    def _take_kept(self) -> Frame | None:
        """A CALL whose client has answers that have not left stays, and what this client sent after it."""
        inbox = self._inbox
        if not self._waits(inbox[0]):
            return inbox.popleft()
        waiting = {inbox[0].channel_id}
        for index, frame in enumerate(list(inbox)):
            if frame.channel_id in waiting:
                continue
            if not self._waits(frame):
                del inbox[index]
                return frame
            waiting.add(frame.channel_id)
        return None

    def _waits(self, frame: Frame) -> bool:
        client = self._by_channel.get(frame.channel_id) if frame.kind == _CALL else None
        return client is not None and client.channel.unsent

    def close(self) -> None:
        """Run what actors left to do."""
        self._frame = None  # if a call was under way, it is over
        self._clients.close()
        self._loop.close()

    def terminate(self) -> None:
        """From the SIGTERM handler: stop now if user code runs, else after the current step."""
        self._terminated = True
        if self._words[RUNNING] and not self._board.shielding:
            raise Terminated
        self._domain.wake()

    # a call -------------------------------------------------------------------------------------------------
    def _call(self, frame: Frame) -> None:
        channel_id, _, call_id, function_id, _, _, _, meta, data = frame
        words = self._words
        try:
            client = self._by_channel[channel_id]
            function = client.functions[function_id]
        except KeyError:
            self._call_unknown(frame)
            return
        if client.channel.unsent:
            self._keep(frame)
            return
        if words[DRAINING] or self._held:
            refusal = self._refusal(frame)
            if refusal is not None:
                self._send(client, *refusal, frame)
                return
        target = function.target
        if target is None:
            self._call_other(client, function, frame)
            return
        self._frame, self._interrupt = frame, None  # what was left was meant for the call before
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
                    end_child()
                words[RUNNING] = 0
            meta, buffers = pack_value(result)
            kind = _RESULT
        except BaseException as error:
            words[RUNNING] = 0  # the signal may have come before the line above that says so
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
        words[row + LAST] = ended_ns
        if ended_ns - started_ns > _LONG_CALL_NS:
            self._drain_domain()

    def _call_other(self, client: Client, function: Function, frame: Frame) -> None:
        """A call of a function not loaded yet, or of any other kind than a plain function."""
        words, row = self._words, function.row
        self._frame, self._interrupt = frame, None  # what was left was meant for the call before
        started_ns = monotonic_ns()
        try:
            kind, encoded = self._run(client, function, frame)
        except BaseException as error:
            self._words[RUNNING] = 0  # as in `_call`
            kind, encoded = _ERROR, self._failure(error)
        ended_ns = monotonic_ns()
        calls, errors = function.counted(kind == _ERROR)
        words[row + CALLS] += calls
        words[row + ERRORS] += errors
        words[row + BUSY] += ended_ns - started_ns
        words[row + LAST] = ended_ns
        self._frame = None
        self._send(client, kind, encoded, frame)
        self._drain_domain()

    def _run(self, client: Client, function: Function, frame: Frame) -> tuple[int, Encoded]:
        if function.native is not None:
            return function.native.answer(frame)
        if function.header.kind == "native":  # a broken one: its arguments are raw bytes, not ours to decode
            return _RESULT, encode_value(self._guard(function.invoke))
        args, kwargs = decode_call(frame.meta, frame.data)
        result = self._guard(function.invoke, *args, **kwargs)
        if function.streams and is_stream(result):
            result = self._stream(client, Items(result, self._loop), frame)
        return _RESULT, encode_value(result)

    def _guard(self, code: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run user code so that signals may interrupt it."""
        try:
            self._words[RUNNING] = 1
            if self._signalled:
                self._heed()
            return code(*args, **kwargs)
        finally:
            if self.forked:
                end_child()
            self._words[RUNNING] = 0

    def _stream(self, client: Client, items: Items, frame: Frame) -> Any:
        self._window = Window(frame.credits)
        self._words[HELD] += 1
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
            self._words[HELD] -= 1

    def _wait(self) -> None:
        frame = self._domain.poll(IDLE_S)
        if frame is not None:
            self._receive(frame)
        if self._terminated:
            raise Terminated
        self._raise_interrupt()

    def _refusal(self, frame: Frame) -> tuple[int, Encoded] | None:
        """Why this call is not run at all, if so."""
        reason = self._cancels.take(frame.channel_id, frame.call_id)
        if reason is not None:
            return _ERROR, encode_error(answer(reason, running=False))
        if self._words[DRAINING]:
            return Kind.REFUSED, encode_error(
                EvictedError("the lease is being taken back; call again elsewhere")
            )
        return None

    def _call_unknown(self, frame: Frame) -> None:
        client = self._clients.meet(frame.channel_id)
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
        trim(error)
        return encode_error(error)

    def _send(self, client: Client, kind: int, encoded: Encoded, frame: Frame) -> None:
        """Send, however long the peer takes to make room; frames that come are kept. Raises Terminated."""
        try:
            while not client.send(kind, frame.call_id, frame.function_id, encoded.meta, encoded.data):
                came = self._domain.poll(0.1)
                if came is not None:
                    self._receive(came)
                if self._terminated:
                    raise Terminated
        except PeerLostError:
            return

    # everything else that arrives ---------------------------------------------------------------------------
    def on_signal(self, _number: int, _stack: FrameType | None) -> None:
        """The handler of the signal that announces bytes on a bootstrap socket."""
        if self._words[RUNNING] and not self._board.shielding:
            self._heed()
        else:
            self._signalled = True

    def _heed_note(self) -> None:
        """Between two acts of a group on the fabric: heed what came in during the first.

        A group may also be closed between calls; then there is nothing to stop, and the note stays.
        """
        if self._frame is None:
            return
        if self._terminated:
            raise Terminated
        if self._signalled:
            self._heed()
        self._raise_interrupt()

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
        if self._board.offer(frame):
            return
        if frame.kind == Kind.CANCEL:
            self._cancel(frame)
        elif running is not None and frame.channel_id == running.channel_id and frame.kind == Kind.YIELD:
            if self._window is not None and frame.call_id == running.call_id:
                self._window.grant(frame.credits)
        else:
            if frame.kind in (Kind.LOST, Kind.GOODBYE):
                self._drop(frame.channel_id)
            elif frame.deadline_ns:
                self._cancels.queue(frame.channel_id, frame.call_id, frame.deadline_ns)
            self._inbox.append(frame)

    def _keep(self, frame: Frame) -> None:
        """A CALL whose turn it was, but whose client has answers that have not left."""
        if frame.deadline_ns:
            self._cancels.queue(frame.channel_id, frame.call_id, frame.deadline_ns)
        self._inbox.appendleft(frame)

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
        queued = any(
            (call.kind, call.channel_id, call.call_id) == (_CALL, frame.channel_id, frame.call_id)
            for call in self._inbox
        )
        self._cancels.put(frame.channel_id, frame.call_id, reason, queued)

    def _control(self, frame: Frame) -> None:
        if frame.kind == Kind.DEFINE:
            self._clients.define(frame)
        elif frame.kind == Kind.CANCEL:
            self._cancel(frame)
        elif not self._board.offer(frame) and frame.kind in (Kind.GOODBYE, Kind.LOST):
            self._clients.forget(frame.channel_id)
            self._cancels.forget(frame.channel_id)
