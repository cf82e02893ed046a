"""Decide when calls ask the site for more executors, how long they wait for them, and who is told of that.

Pure, like the scheduler it belongs to (`dispatch.py`): effects are collected, time is given.
"""

import enum
from collections.abc import Mapping

from isthmus.core.errors import IsthmusError, NoCapacityError, PeerLostError, SiteUnavailableError
from isthmus.sdk.timers import Timers
from isthmus.sdk.work import GROW_PAUSE_S, NEVER, UNKNOWN_S, Due, Effect, Pool, Request, Warn

GROW_BACKLOG_S = 0.05  # a backlog shorter than a cold start is not worth a lease
GROW_PAUSE_S_MAX = 5.0
QUEUE_WAIT_S = 60.0  # one stay in the site's queue when we hold nothing at all; then another
ROOM_WAIT_S = 0.5  # at least, for the executors that we gave back ourselves to make room
WARN_S = 10.0  # calls that have had no executor for so long are told of; then after twice as long, and so on
SITE_ATTEMPTS_MAX = 3  # requests that find no site before calls without an executor fail
GRANT_ATTEMPTS_MAX = 10  # ... or an executor that was taken back before we came


class Refusal(enum.Enum):
    """What follows when the site gave nothing."""

    GO_ON = enum.auto()  # with what the pool holds, or in the queue
    FAIL = enum.auto()  # the calls that wait


class Growing:
    def __init__(
        self, capacity_wait_s: float, effects: list[Effect], timers: Timers, expected_s: Mapping[int, float]
    ) -> None:
        """capacity_wait_s: how long calls without an executor may wait for one before they fail.
        expected_s: of a call, by label.
        """
        self._capacity_wait_s = capacity_wait_s
        self._effects = effects
        self._timers = timers
        self._expected_s = expected_s

    def grow(self, pool: Pool, now_s: float, idle: bool) -> None:
        """Calls wait: ask for more, if that is worth it and not too soon.

        idle    they wait although executors have room, since those close too soon: however few they are, only
                another executor takes them
        """
        room = pool.limit - len(pool.executors)
        if room > 0 and not pool.executors and pool.waiting_s == NEVER:
            self._watch(pool, now_s, now_s + WARN_S)
        if (
            pool.requesting
            or room <= 0
            or now_s < pool.grow_after_s
            or (not idle and self._backlog_s(pool) < GROW_BACKLOG_S)
        ):
            return
        wait_s = self._queue_wait_s(pool, now_s) if pool.refusals and not pool.executors else 0.0
        self._request(pool, min(room, pool.growth, len(pool.queue)), wait_s)

    def granted(self, pool: Pool) -> None:
        pool.requesting, pool.pause_s = False, GROW_PAUSE_S
        pool.refusals = pool.silences = 0
        pool.waiting_s = pool.warn_s = NEVER
        pool.growth *= 2

    def refused(self, pool: Pool, error: IsthmusError, now_s: float) -> Refusal:
        """Go on with what we hold; with nothing in hand, wait our turn, then fail."""
        pool.requesting, pool.growth, pool.why = False, 1, str(error)
        if pool.executors:
            self.pause(pool, now_s)
        elif not pool.queue:  # nobody waits any more
            pool.refusals = pool.silences = 0
        elif isinstance(error, NoCapacityError):
            return self._queue_up(pool, now_s)
        elif pool.silences + 1 < _attempts_max(error):
            pool.silences += 1
            self.pause(pool, now_s)
        else:
            return Refusal.FAIL
        return Refusal.GO_ON

    def may_grow(self, pool: Pool, now_s: float) -> bool:
        """Whether another executor is on its way, or may be asked for now."""
        has_room = len(pool.executors) < pool.limit and now_s >= pool.grow_after_s
        return pool.requesting or has_room

    def pause(self, pool: Pool, now_s: float) -> None:
        """Ask for no more for a while: there is none, or none that would do."""
        pool.grow_after_s = now_s + pool.pause_s
        pool.pause_s = min(2 * pool.pause_s, GROW_PAUSE_S_MAX)
        self._timers.at(pool.grow_after_s, Due.GROW, pool)

    def warn_due(self, pool: Pool, now_s: float) -> None:
        if now_s < pool.warn_s:  # the wait that this timer was for is over
            return
        waited_s = now_s - pool.waiting_s
        pool.waiting_s = pool.warn_s = NEVER
        if pool.queue and not pool.executors:
            self._effects.append(Warn(pool, waited_s))
            self._watch(pool, now_s - waited_s, now_s + waited_s)

    def _watch(self, pool: Pool, waiting_s: float, warn_s: float) -> None:
        pool.waiting_s, pool.warn_s = waiting_s, warn_s
        self._timers.at(warn_s, Due.WARN, pool)

    def _backlog_s(self, pool: Pool) -> float:
        """How long the executors at hand are busy, the queue included, judged by its first call."""
        if not pool.executors:
            return NEVER
        queued_s = len(pool.queue) * self._expected_s.get(pool.queue[0].label, UNKNOWN_S)
        return (queued_s + sum(one.load_s for one in pool.executors.values())) / len(pool.executors)

    def _request(self, pool: Pool, leases: int, wait_s: float) -> None:
        pool.requesting = True
        self._effects.append(Request(pool, leases, wait_s))

    def _queue_up(self, pool: Pool, now_s: float) -> Refusal:
        """Wait at the site: at once at first, later not as fast as it may turn us away; in the end fail."""
        pool.refusals += 1
        pool.silences = 0
        if pool.refusals == 1:
            pool.refused_s = now_s
            self._request(pool, 1, max(self._queue_wait_s(pool, now_s), ROOM_WAIT_S))
        elif self._queue_wait_s(pool, now_s) > 0:
            self.pause(pool, now_s)
        else:
            return Refusal.FAIL
        return Refusal.GO_ON

    def _queue_wait_s(self, pool: Pool, now_s: float) -> float:
        """What one stay in the site's queue may take of the time that these calls have to wait."""
        return min(QUEUE_WAIT_S, max(self._capacity_wait_s - (now_s - pool.refused_s), 0.0))


def _attempts_max(error: IsthmusError) -> int:
    """How often in a row a request may end like this before its calls fail."""
    if isinstance(error, PeerLostError):
        return GRANT_ATTEMPTS_MAX
    return SITE_ATTEMPTS_MAX if isinstance(error, SiteUnavailableError) else 1
