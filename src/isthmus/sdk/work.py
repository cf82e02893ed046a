"""The scheduler's nouns: calls, executors, pools, and the effects it asks its shell for.

Not here: what happens to them (`dispatch.py`).
"""

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from isthmus.sdk.function import Retry

UNKNOWN_S = 1.0  # expected of a function that never ran: nothing is queued behind it
GROW_PAUSE_S = 0.25  # after "no capacity", doubling up to growing.GROW_PAUSE_S_MAX
NEVER = float("inf")


class State(enum.Enum):
    QUEUED = enum.auto()
    WAITING = enum.auto()
    SENT = enum.auto()
    EXAMINED = enum.auto()
    SETTLED = enum.auto()


class Due(enum.Enum):
    """What a timer is for."""

    DEADLINE = enum.auto()
    KILL = enum.auto()
    RETRY = enum.auto()
    GROW = enum.auto()
    IDLE = enum.auto()
    CLOSE = enum.auto()
    WARN = enum.auto()


@dataclass(slots=True, eq=False, repr=False)
class Call:
    """One call of a user. `number` is its call id on the wire, unique in this client.

    label       which function: calls with one label are expected to take equally long
    replayable  False once part of its results was handed out (a stream that has begun)
    abandoned   settled early (timeout, cancel) while an executor still works on it
    """

    number: int
    pool: "Pool"
    payload: object
    retry: Retry
    deadline_s: float = NEVER
    state: State = State.QUEUED
    label: int = 0
    expected_s: float = UNKNOWN_S
    attempts: int = 0
    replayable: bool = True
    abandoned: bool = False
    sent_s: float = 0.0
    name: str = ""  # for messages, like timeout_s
    timeout_s: float | None = None


@dataclass(slots=True, eq=False, repr=False)
class Executor:
    """One executor and the calls sent to it, oldest first: the first one may be running."""

    name: str
    pool: "Pool"
    link: object
    inflight: dict[int, Call] = field(default_factory=dict)
    load_s: float = 0.0  # what the calls in flight are expected to take
    last_s: float = 0.0  # when it last answered
    closes_s: float = NEVER  # when it takes no more calls, because the time of its allocation ends
    past_until_s: float = NEVER  # from then on no call may go there past the scheduler
    draining: bool = False
    claimed: bool = False  # a thread calls it past the scheduler at this moment


@dataclass(slots=True, eq=False, repr=False)
class Pool:
    """Executors that may serve the same calls. `sticky`: state lives in its one executor, nothing is
    replayed.
    """

    name: str
    request: object
    limit: int
    sticky: bool = False
    queue: deque[Call] = field(default_factory=deque)
    executors: dict[str, Executor] = field(default_factory=dict)
    requesting: bool = False
    growth: int = 1
    life_s: float = 0.0  # the longest that one of its executors had before it closes, when it was granted
    grow_after_s: float = 0.0
    pause_s: float = GROW_PAUSE_S
    refusals: int = 0  # for want of capacity, in a row
    refused_s: float = 0.0  # when the first of them came
    waiting_s: float = NEVER  # since when its calls have had no executor
    warn_s: float = NEVER  # when somebody is told of that
    why: str = ""  # the site's latest words on that
    silences: int = 0  # requests in a row that found no site, or an executor that was gone
    broken: BaseException | None = None
    retired: bool = False  # its executors were given back; it gets no others
    closing: bool = False  # its user is gone: it ends with its last call

    @property
    def busy(self) -> bool:
        return bool(self.queue) or any(executor.inflight for executor in self.executors.values())


class Send(NamedTuple):
    executor: Executor
    call: Call


class Interrupt(NamedTuple):
    executor: Executor
    call: Call
    reason: bytes


class Kill(NamedTuple):
    executor: Executor


class Close(NamedTuple):
    """What goes past the scheduler could take longer than the executor has."""

    executor: Executor


class Request(NamedTuple):
    pool: Pool
    leases: int
    wait_s: float


class Release(NamedTuple):
    executor: Executor


class Examine(NamedTuple):
    executor: Executor
    call: Call


class Warn(NamedTuple):
    """Somebody should learn that the calls of this pool still wait."""

    pool: Pool
    waited_s: float


class Settle(NamedTuple):
    call: Call
    error: BaseException


Effect = Send | Interrupt | Kill | Close | Request | Release | Examine | Settle | Warn
