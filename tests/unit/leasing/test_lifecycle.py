"""The state machine of one lease: what can happen, what cannot, and that it ends once for one reason."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.core.ids import AllocationId, ExecutorId, LeaseId, NodeId, TenantId
from isthmus.core.model import (
    EndReason,
    Enforcement,
    Environment,
    ExecutorEnd,
    ExecutorInfo,
    Lease,
    LeaseClass,
    LeaseState,
    Resources,
    Usage,
)
from isthmus.leasing.lifecycle import (
    LOST_EXECUTORS_MAX,
    Adopted,
    DrainOnNode,
    DrainOrdered,
    EndOnNode,
    EndOrdered,
    Event,
    ExecutorAdded,
    ExecutorGone,
    FreeResources,
    Gone,
    Granted,
    IllegalTransitionError,
    Measured,
    Renewed,
    RenewOnNode,
    Started,
    StartOnNode,
    StartOrdered,
    step,
)

EXECUTOR = ExecutorInfo(executor=ExecutorId("ex_1"), address="unix:/1", pid=1)
OTHER = ExecutorInfo(executor=ExecutorId("ex_2"), address="unix:/2", pid=2)
NEW = Lease(
    lease=LeaseId("ls_1"),
    tenant=TenantId("alice"),
    resources=Resources(),
    lease_class=LeaseClass.ELASTIC,
    environment=Environment(),
    state=LeaseState.REQUESTED,
)
GRANTED = Granted(at_s=1.0, node=NodeId("n"), allocation=AllocationId("al_1"))
START = StartOrdered(at_s=2.0, deadline_s=30.0)
STARTED = Started(at_s=3.0, executor=EXECUTOR, enforcement=Enforcement())
EVENTS: tuple[Event, ...] = (
    GRANTED,
    START,
    STARTED,
    Adopted(at_s=4.0, executors=(EXECUTOR,), usage=Usage(calls=1)),
    Renewed(at_s=4.0, deadline_s=60.0),
    ExecutorAdded(at_s=4.0, executor=OTHER),
    ExecutorGone(at_s=4.0, executor=EXECUTOR.executor),
    Measured(at_s=4.0, usage=Usage(calls=2)),
    DrainOrdered(at_s=5.0),
    EndOrdered(at_s=6.0, reason=EndReason.RELEASED),
    EndOrdered(at_s=6.0, reason=EndReason.EXPIRED, detail="not renewed"),
    Gone(at_s=7.0, reason=EndReason.NODE_LOST, detail="silent"),
)


def _after(*events: Event) -> Lease:
    lease = NEW
    for event in events:
        lease, _ = step(lease, event)
    return lease


def test_a_lease_goes_the_whole_way() -> None:
    lease, effects = step(_after(GRANTED), START)
    assert (lease.state, effects) == (LeaseState.STARTING, (StartOnNode(),))
    lease = _after(GRANTED, START, STARTED)
    assert (lease.state, lease.executors) == (LeaseState.ACTIVE, (EXECUTOR,))
    lease, effects = step(lease, DrainOrdered(at_s=4.0))
    assert (lease.state, effects) == (LeaseState.DRAINING, (DrainOnNode(),))
    lease, effects = step(lease, EndOrdered(at_s=5.0, reason=EndReason.EVICTED))
    assert (lease.state, effects) == (LeaseState.DRAINING, (EndOnNode(),))
    lease, effects = step(lease, Gone(at_s=6.0, reason=EndReason.EXITED))
    assert (lease.state, effects) == (LeaseState.ENDED, (FreeResources(),))
    assert (lease.end_reason, lease.ended_s, lease.executors) == (EndReason.EVICTED, 6.0, ())


def test_the_first_reason_stands_and_the_order_is_repeated() -> None:
    ending = _after(GRANTED, START, STARTED, EndOrdered(at_s=4.0, reason=EndReason.RELEASED))
    again, effects = step(ending, EndOrdered(at_s=5.0, reason=EndReason.EXPIRED))
    assert again is ending
    assert effects == (EndOnNode(),)


def test_renewals_never_shorten_and_never_revive() -> None:
    lease, effects = step(_after(GRANTED, START, STARTED), Renewed(at_s=4.0, deadline_s=10.0))
    assert (lease.deadline_s, effects) == (30.0, (RenewOnNode(),))
    ending = _after(GRANTED, START, STARTED, EndOrdered(at_s=4.0, reason=EndReason.RELEASED))
    with pytest.raises(IllegalTransitionError, match="Renewed cannot happen"):
        step(ending, Renewed(at_s=5.0, deadline_s=100.0))


def test_a_lease_that_never_had_resources_frees_none() -> None:
    _, effects = step(NEW, Gone(at_s=1.0, reason=EndReason.CANCELLED))
    assert effects == ()


@given(st.lists(st.sampled_from(EVENTS), max_size=20))
def test_whatever_happens_a_lease_ends_at_most_once_and_for_one_reason(events: list[Event]) -> None:
    lease = NEW
    reason: EndReason | None = None
    for event in events:
        try:
            after, effects = step(lease, event)
        except IllegalTransitionError:
            continue
        assert lease.state is not LeaseState.ENDED, "ended is final"
        assert reason is None or after.end_reason is reason
        assert (FreeResources() in effects) == (
            after.state is LeaseState.ENDED and lease.allocation is not None
        )
        reason = after.end_reason
        lease = after
    assert (lease.state is LeaseState.ENDED) <= (reason is not None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(lease), type=Lease) == lease


def test_a_lease_remembers_how_its_latest_executors_died() -> None:
    ends = [
        ExecutorEnd(
            executor=ExecutorId(f"ex_{number}"), reason=EndReason.EXITED, detail=f"exit code {number}"
        )
        for number in range(LOST_EXECUTORS_MAX + 1)
    ]
    gone = [ExecutorGone(at_s=4.0, executor=end.executor, end=end) for end in ends]
    lease = _after(GRANTED, START, STARTED, *gone)
    assert lease.lost_executors == tuple(ends[1:])
