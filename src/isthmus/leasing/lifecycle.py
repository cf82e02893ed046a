"""The life of a lease as a state machine without I/O: `step(lease, event) -> (lease, effects)`.

    requested --Granted--> granted --StartOrdered--> starting --Started--> active --DrainOrdered--> draining
        |                     |                         |                    |                        |
        +------- Gone --------+                         +------ EndOrdered --+------------------------+
                 |                                                  |
               ended  <------------------- Gone ------ draining, with its end_reason already set

`Gone` is the only way to `ended`: nothing of the lease runs any more, or it has been fenced. Before that,
EndOrdered writes down why it is to end, and the order to the agent is repeated until the agent confirms it.
So a lease keeps its resources until they are known to be free, and it has one reason, the first.

Invariants: `ended` is final; `end_reason` is set once; effects are idempotent and may be repeated after a
crash. Not here: carrying out effects (`leasing.py`), writing transitions down (`ledger.py`).
"""

import msgspec

from isthmus.core.errors import IsthmusError
from isthmus.core.ids import AllocationId, NodeId
from isthmus.core.model import EndReason, Enforcement, ExecutorEnd, ExecutorInfo, Lease, LeaseState, Usage

LOST_EXECUTORS_MAX = 16  # whose ends a lease remembers: their clients ask within a second or two


class IllegalTransitionError(IsthmusError):
    """An event that cannot happen in the lease's state: a bug of ours, never of the caller."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    at_s: float


class Granted(Event, frozen=True):
    """`allocation` None: harvested, from what somebody else's job holds."""

    node: NodeId
    allocation: AllocationId | None
    agent: NodeId | None = None


class StartOrdered(Event, frozen=True):
    deadline_s: float


class Started(Event, frozen=True):
    """The agent confirmed the start."""

    executor: ExecutorInfo
    enforcement: Enforcement


class Adopted(Event, frozen=True):
    """The agent (or the site) came back and the lease still runs."""

    executors: tuple[ExecutorInfo, ...]
    usage: Usage


class Renewed(Event, frozen=True):
    deadline_s: float


class ExecutorAdded(Event, frozen=True):
    executor: ExecutorInfo


class ExecutorGone(Event, frozen=True):
    """One of several executors ended; the lease goes on. `end`: how, unless by order."""

    executor: str
    end: ExecutorEnd | None = None


class Measured(Event, frozen=True):
    usage: Usage


class DrainOrdered(Event, frozen=True):
    """It may finish what runs; after the grace it is evicted. `detail`: why, where that is worth a word."""

    detail: str = ""


class EndOrdered(Event, frozen=True):
    reason: EndReason
    detail: str = ""


class Gone(Event, frozen=True):
    """Nothing of it runs any more. The reason counts only if none was written down before."""

    reason: EndReason
    detail: str = ""


class Effect(msgspec.Struct, frozen=True):
    """What the shell has to do once the transition is written down."""


class StartOnNode(Effect, frozen=True):
    pass


class RenewOnNode(Effect, frozen=True):
    pass


class DrainOnNode(Effect, frozen=True):
    pass


class EndOnNode(Effect, frozen=True):
    pass


class FreeResources(Effect, frozen=True):
    pass


OPEN = frozenset({LeaseState.STARTING, LeaseState.ACTIVE, LeaseState.DRAINING})
Effects = tuple[Effect, ...]


def step(lease: Lease, event: Event) -> tuple[Lease, Effects]:
    """The lease after the event, and what to do then. Raises IllegalTransitionError for any other pair."""
    match event:
        case Granted() | StartOrdered() | Started():
            return _begin(lease, event)
        case EndOrdered() | Gone() | DrainOrdered():
            return _finish(lease, event)
        case _:
            return _run(lease, event)


def _begin(lease: Lease, event: Event) -> tuple[Lease, Effects]:
    replace = msgspec.structs.replace
    match lease.state, event:
        case LeaseState.REQUESTED, Granted(node=node, allocation=allocation, agent=agent):
            placed = replace(lease, node=node, allocation=allocation, agent=agent)
            return replace(placed, state=LeaseState.GRANTED), ()
        case LeaseState.GRANTED, StartOrdered(deadline_s=deadline_s):
            return replace(lease, state=LeaseState.STARTING, deadline_s=deadline_s), (StartOnNode(),)
        case LeaseState.STARTING, Started(executor=executor, enforcement=enforcement):
            started = replace(lease, state=LeaseState.ACTIVE, executors=(executor,), enforcement=enforcement)
            return started, ()
        case _:
            raise _illegal(lease, event)


def _run(lease: Lease, event: Event) -> tuple[Lease, Effects]:
    """Events that leave the state as it is."""
    if lease.state not in OPEN:
        raise _illegal(lease, event)
    replace = msgspec.structs.replace
    match event:
        case Measured(usage=usage):
            return replace(lease, usage=usage), ()
        case ExecutorGone(executor=gone, end=end):
            left = tuple(e for e in lease.executors if e.executor != gone)
            lost = (*lease.lost_executors, *([end] if end is not None else []))
            return replace(lease, executors=left, lost_executors=lost[-LOST_EXECUTORS_MAX:]), ()
        case ExecutorAdded(executor=executor) if lease.state is LeaseState.ACTIVE:
            others = tuple(e for e in lease.executors if e.executor != executor.executor)
            return replace(lease, executors=(*others, executor)), ()
        case Renewed(deadline_s=deadline_s) if lease.end_reason is None:
            return replace(lease, deadline_s=max(deadline_s, lease.deadline_s)), (RenewOnNode(),)
        case Adopted(executors=executors, usage=usage):
            return replace(lease, executors=executors, usage=usage), ()
        case _:
            raise _illegal(lease, event)


def _finish(lease: Lease, event: Event) -> tuple[Lease, Effects]:
    replace = msgspec.structs.replace
    match lease.state, event:
        case LeaseState.ACTIVE, DrainOrdered():
            return replace(lease, state=LeaseState.DRAINING), (DrainOnNode(),)
        case state, EndOrdered(reason=reason, detail=detail) if state in OPEN:
            if lease.end_reason is not None:
                return lease, (EndOnNode(),)  # the first reason stands; the order is repeated
            ending = replace(lease, state=LeaseState.DRAINING, end_reason=reason, end_detail=detail)
            return ending, (EndOnNode(),)
        case state, Gone(reason=reason, detail=detail) if state is not LeaseState.ENDED:
            ended = replace(lease, state=LeaseState.ENDED, ended_s=event.at_s, executors=())
            if lease.end_reason is None:
                ended = replace(ended, end_reason=reason, end_detail=detail)
            return ended, (FreeResources(),) if lease.allocation is not None else ()
        case _:
            raise _illegal(lease, event)


def _illegal(lease: Lease, event: Event) -> IllegalTransitionError:
    return IllegalTransitionError(
        f"lease {lease.lease} is {lease.state}: {type(event).__name__} cannot happen"
    )
