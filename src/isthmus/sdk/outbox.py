"""Carry out what the scheduler asks for: frames to executors, orders to the keeper, channels to close.

All under the engine's lock, but `close_doomed`, which is the polling thread's. Frames that find no room at
once are kept by their link and go out with `flush`. Not here: deciding (`dispatch.py`), frames that come in
(`engine.py`).
"""

import logging
from collections import deque
from collections.abc import Callable
from time import monotonic

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import FabricError, PeerLostError
from isthmus.fabric.channels import Frame
from isthmus.sdk import work
from isthmus.sdk.calls import Payload
from isthmus.sdk.dispatch import Dispatch
from isthmus.sdk.keeping import Keeper, with_count
from isthmus.sdk.links import TRUST_S, Link
from isthmus.sdk.work import Call, Executor

log = logging.getLogger("isthmus.sdk")

Settlement = tuple[Payload, Frame | None, BaseException | None]


class Outbox:
    def __init__(
        self, core: Dispatch, keeper: Keeper, wake: Callable[[], None], nudge: Callable[[], None]
    ) -> None:
        """wake: ends a poll that sleeps; nudge: makes the polling thread look at what is to be done."""
        self._core = core
        self._keeper = keeper
        self._wake = wake
        self._nudge = nudge
        self.executors: dict[int, Executor] = {}  # by channel
        self._backlogged: set[Link] = set()
        self._doomed: deque[Link] = deque()  # channels to close

    @property
    def has_backlog(self) -> bool:
        return bool(self._backlogged)

    @property
    def has_doomed(self) -> bool:
        return bool(self._doomed)

    def carry_out(self) -> list[Settlement]:
        """Returns which futures are to be settled, which is done without the lock."""
        settled: list[Settlement] = []
        while self._core.effects:
            for effect in self._core.take_effects():
                match effect:
                    case work.Send(executor, call):
                        self._send(executor, call)
                    case work.Settle(call, error):
                        settled.append((payload_of(call), None, error))
                    case work.Request(pool, leases, wait_s):
                        assert isinstance(pool.request, LeaseRequest)
                        self._keeper.request(pool, with_count(pool.request, leases, wait_s))
                    case work.Examine(executor, call):
                        self._keeper.examine(executor, call)
                    case work.Interrupt(executor, call, reason):
                        self.interrupt(executor, call.number, reason)
                    case work.Kill(executor):
                        self._keeper.kill(link_of(executor))
                    case work.Close(executor):
                        link_of(executor).open = False
                    case work.Release(executor):
                        self._release(executor)
                    case work.Warn(pool, waited_s):
                        log.warning(
                            "%d calls have waited %.0f s for an executor (%s); `isthmus status` and `isthmus "
                            "nodes` say more", len(pool.queue), waited_s, pool.why or "no answer yet",
                        )  # fmt: skip
        return settled

    def grant(self, executor: Executor, call: Call, items: int) -> None:
        """Let a stream send so many items more."""
        link = link_of(executor)
        try:
            link.grant(call.number, payload_of(call).definition.number, items)
        except PeerLostError:
            return  # its LOST frame follows
        if link.backlogged:
            self._backlogged.add(link)

    def interrupt(self, executor: Executor, number: int, reason: bytes) -> None:
        try:
            link_of(executor).interrupt(number, reason)
        except FabricError as error:
            log.debug("could not interrupt a call on %s: %s", executor.name, error)

    def lost(self, channel_id: int) -> None:
        """The executor at the other end of this channel is gone."""
        link = link_of(self.executors.pop(channel_id))
        link.open = False
        self._backlogged.discard(link)
        self._doom(link)

    def flush(self) -> None:
        for link in list(self._backlogged):
            try:
                link.flush()
            except PeerLostError:
                self._backlogged.discard(link)  # its LOST frame follows
            if not link.backlogged:
                self._backlogged.discard(link)

    def close_doomed(self) -> None:
        while self._doomed:
            self._doomed.popleft().channel.close()

    def close_all(self) -> None:
        """The domain is about to close: these channels go with it."""
        for link in (*self._doomed, *map(link_of, self.executors.values())):
            link.channel.close()

    def _send(self, executor: Executor, call: Call) -> None:
        link, payload = link_of(executor), payload_of(call)
        if len(executor.inflight) == 1 and call.sent_s - executor.last_s > TRUST_S and link.has_ended():
            self._core.unsent(executor, call, monotonic())
            return
        if payload.future is not None:
            payload.future.mark_running()
        try:
            link.define(payload.definition)
            link.call(call.number, payload.definition.number, payload.meta, payload.data, _deadline_ns(call))
        except PeerLostError:
            self._core.unsent(executor, call, monotonic())
        except Exception as error:  # a task boundary: whoever waits for the call must learn of it
            self._core.failed(executor, call.number, _as_ours(error), monotonic())
        if link.backlogged:
            self._backlogged.add(link)
            self._wake()

    def _release(self, executor: Executor) -> None:
        link = link_of(executor)
        link.open = False
        if self.executors.pop(link.channel.id, None) is not None:
            self._doom(link)
        self._backlogged.discard(link)
        self._keeper.release(link)

    def _doom(self, link: Link) -> None:
        """Closing a channel is for the thread that polls its domain."""
        self._doomed.append(link)
        self._nudge()


def link_of(executor: Executor) -> Link:
    assert isinstance(executor.link, Link)
    return executor.link


def payload_of(call: Call) -> Payload:
    assert isinstance(call.payload, Payload)
    return call.payload


def _deadline_ns(call: Call) -> int:
    """Time that the call had when it was sent; 0: no limit."""
    return 0 if call.deadline_s == work.NEVER else max(int((call.deadline_s - call.sent_s) * 1e9), 1)


def _as_ours(error: Exception) -> Exception:
    if isinstance(error, FabricError | ValueError):
        return error
    log.error("a call could not be sent", exc_info=error)
    return FabricError(f"the call could not be sent: {type(error).__name__}: {error}")
