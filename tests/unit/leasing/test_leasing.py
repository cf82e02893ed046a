"""What happens to leases: asked for, held, given back, taken back, lost."""

import asyncio

import msgspec
import pytest

from isthmus.core import tokens
from isthmus.core.api import LeaseRequest
from isthmus.core.errors import (
    DeniedError,
    FunctionLoadError,
    InvalidRequestError,
    LeaseEndedError,
    NoCapacityError,
    NotFoundError,
    PermissionDeniedError,
    SiteUnavailableError,
)
from isthmus.core.ids import ExecutorId, LeaseId, NodeId
from isthmus.core.model import EndReason, Environment, LeaseClass, LeaseState, Principal, Resources, Usage
from isthmus.node.messages import (
    DrainLease,
    EndLease,
    ExecutorEnded,
    FunctionUse,
    Heartbeat,
    LeaseEnded,
    LeaseReport,
    RenewLease,
    RunningLease,
    StartLease,
    Warm,
)
from isthmus.policy import load_policies
from tests.unit.leasing.rooms import ADMIN, ALICE, BOB, SETTINGS, Room, in_a_room, limited

ONE = LeaseRequest(resources=Resources(cores=1))
FOUR = LeaseRequest(resources=Resources(cores=4))


def _waiting(request: LeaseRequest, wait_s: float = 30.0, **changes: object) -> LeaseRequest:
    fields = {field: getattr(request, field) for field in request.__struct_fields__}
    return LeaseRequest(**{**fields, "wait_s": wait_s, **changes})


async def _lease(room: Room, who: Principal = ALICE, request: LeaseRequest = ONE) -> LeaseId:
    return (await room.leasing.request(who, request)).grants[0].lease


def _end_of(room: Room, lease: LeaseId) -> tuple[LeaseState, EndReason | None]:
    found = room.leasing.lease(ADMIN, lease)
    return found.state, found.end_reason


# asking -----------------------------------------------------------------------------------------------------
@in_a_room()
async def test_a_grant_names_an_executor_and_carries_a_token_that_it_can_verify(room: Room) -> None:
    reply = await room.leasing.request(ALICE, ONE)
    (grant,) = reply.grants
    key = tokens.lease_key(b"k" * 32, grant.lease)
    claims = tokens.verify(grant.token, key, grant.lease, room.clock.now())
    assert (claims.tenant, claims.node) == ("alice", grant.node)
    assert grant.executors == (room.agents.running[grant.lease],)
    assert room.agents.orders(StartLease)[0].lease_key == key
    assert _end_of(room, grant.lease) == (LeaseState.ACTIVE, None)


@in_a_room()
async def test_a_request_that_finds_nothing_free_is_told_so_at_once(room: Room) -> None:
    await room.leasing.request(BOB, FOUR)
    with pytest.raises(NoCapacityError, match="isthmus explain rq_"):
        await room.leasing.request(ALICE, ONE)


@in_a_room()
async def test_fewer_than_asked_are_granted_with_the_reason(room: Room) -> None:
    reply = await room.leasing.request(ALICE, _waiting(ONE, 0.0, count=9))
    assert len(reply.grants) == 4
    assert "4 of 9" in reply.explanation


@in_a_room()
async def test_a_request_waits_until_somebody_gives_back(room: Room) -> None:
    held = await _lease(room, BOB, FOUR)
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, _waiting(ONE)))
    await room.beat_for(5.0)
    assert room.leasing.requests_waiting == 1
    await room.leasing.release(BOB, held)
    reply = await waiting
    assert len(reply.grants) == 1
    assert room.leasing.requests_waiting == 0


@in_a_room()
async def test_a_request_that_waited_in_vain_is_refused_when_its_time_is_up(room: Room) -> None:
    await _lease(room, BOB, FOUR)
    started = room.loop.time()
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, _waiting(ONE, 7.0)))
    await room.beat_for(8.0)
    with pytest.raises(NoCapacityError):
        await waiting
    assert room.loop.time() - started < 9.0
    assert room.leasing.requests_waiting == 0


@in_a_room()
async def test_the_queue_is_bounded(room: Room) -> None:
    await _lease(room, BOB, FOUR)
    waiting = [asyncio.ensure_future(room.leasing.request(ALICE, _waiting(ONE, 3.0))) for _ in range(3)]
    await room.clock.sleep(0.1)
    with pytest.raises(NoCapacityError, match="queue_max"):
        await room.leasing.request(ALICE, _waiting(ONE, 3.0))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, NoCapacityError) for result in results)


@in_a_room()
async def test_a_tenant_that_fills_the_queue_keeps_no_other_out(room: Room) -> None:
    held = await _lease(room, ADMIN, FOUR)
    alices = [asyncio.ensure_future(room.leasing.request(ALICE, _waiting(ONE))) for _ in range(3)]
    await room.clock.sleep(0.1)
    bobs = asyncio.ensure_future(room.leasing.request(BOB, _waiting(ONE)))
    await room.clock.sleep(0.1)
    with pytest.raises(NoCapacityError, match="queue_max"):
        await alices.pop()
    with pytest.raises(NoCapacityError, match="queue_max"):  # now Alice is not far ahead any more
        await asyncio.gather(*(room.leasing.request(BOB, _waiting(ONE)) for _ in range(2)))
    await room.leasing.release(ADMIN, held)
    assert len((await bobs).grants) == 1
    for alice in alices:
        assert len((await alice).grants) == 1


@in_a_room(settings=msgspec.structs.replace(SETTINGS, queue_max=4))
async def test_a_request_that_does_not_wait_takes_nobodys_place_in_the_queue(room: Room) -> None:
    held = await _lease(room, ADMIN, FOUR)
    alices = [asyncio.ensure_future(room.leasing.request(ALICE, _waiting(ONE)))]
    bobs = [asyncio.ensure_future(room.leasing.request(BOB, _waiting(ONE))) for _ in range(3)]
    await room.clock.sleep(0.1)
    with pytest.raises(NoCapacityError, match="alice wait before it, longer than its wait_s=0"):
        await room.leasing.request(ALICE, ONE)
    await room.leasing.release(ADMIN, held)
    assert [len(reply.grants) for reply in await asyncio.gather(*alices, *bobs)] == [1, 1, 1, 1]


@in_a_room()
async def test_tenants_take_turns_and_each_is_served_in_order(room: Room) -> None:
    held = await _lease(room, ADMIN, FOUR)
    served: list[str] = []

    async def ask(who: Principal, name: str) -> None:
        reply = await room.leasing.request(who, _waiting(FOUR))
        served.append(name)
        await room.leasing.release(who, reply.grants[0].lease)

    asking = []
    for who, name in ((ALICE, "a1"), (ALICE, "a2"), (BOB, "b1")):
        asking.append(asyncio.ensure_future(ask(who, name)))
        await room.clock.sleep(0.01)
    await room.leasing.release(ADMIN, held)
    await asyncio.gather(*asking)
    assert served == ["a1", "b1", "a2"]


@in_a_room()
async def test_a_client_that_leaves_the_queue_is_forgotten(room: Room) -> None:
    held = await _lease(room, BOB, FOUR)
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, _waiting(ONE)))
    await room.clock.sleep(0.1)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert room.leasing.requests_waiting == 0
    await room.leasing.release(BOB, held)
    assert room.leasing.leases(ADMIN, ended=False) == []


@in_a_room(nodes=2)
async def test_a_group_starts_together_or_not_at_all(room: Room) -> None:
    room.agents.fail_next[StartLease] = [FunctionLoadError("no module named torch")]
    with pytest.raises(FunctionLoadError, match="torch"):
        await room.leasing.request(ALICE, _waiting(ONE, 0.0, count=5, together=True))
    await room.clock.sleep(1.0)
    assert room.agents.running == {}
    assert {lease.end_reason for lease in room.leasing.leases(ADMIN, ended=True)} == {EndReason.FAILED}
    assert len((await room.leasing.request(ALICE, _waiting(ONE, 0.0, count=8, together=True))).grants) == 8


@in_a_room()
async def test_without_together_what_started_is_granted(room: Room) -> None:
    room.agents.fail_next[StartLease] = [FunctionLoadError("no module named torch")]
    reply = await room.leasing.request(ALICE, _waiting(ONE, 0.0, count=3))
    assert len(reply.grants) == 2
    assert "torch" in reply.explanation


@in_a_room()
async def test_a_start_without_an_answer_keeps_its_cores_until_the_agent_confirms_the_end(room: Room) -> None:
    room.agents.fail_next[StartLease] = [SiteUnavailableError("no answer")]
    room.agents.fail_next[EndLease] = [SiteUnavailableError("no answer")]
    with pytest.raises(SiteUnavailableError):
        await room.leasing.request(ALICE, FOUR)
    with pytest.raises(NoCapacityError):
        await room.leasing.request(ALICE, ONE)
    await room.clock.sleep(1.0)  # the next tick repeats the order, and it is confirmed
    await room.leasing.request(ALICE, FOUR)


@in_a_room()
async def test_a_platform_that_refuses_ends_the_lease(room: Room) -> None:
    room.platform.is_full = True
    with pytest.raises(NoCapacityError, match="because a test says so"):
        await room.leasing.request(ALICE, ONE)
    room.platform.is_full = False
    await room.leasing.request(ALICE, FOUR)


@in_a_room()
async def test_requests_that_make_no_sense_are_refused(room: Room) -> None:
    for request in (_waiting(ONE, 0.0, count=0), _waiting(ONE, -1.0)):
        with pytest.raises(InvalidRequestError):
            await room.leasing.request(ALICE, request)


@in_a_room()
async def test_quota_denies_and_pools_limit(room: Room) -> None:
    await room.leasing.request(limited(leases=1), ONE)
    with pytest.raises(DeniedError, match="may hold 1 leases"):
        await room.leasing.request(limited(leases=1), ONE)
    assert len((await room.leasing.request(BOB, _waiting(ONE, 0.0, pool="two", count=3))).grants) == 2


@in_a_room()
async def test_a_start_may_take_longer_than_a_lease_lives(room: Room) -> None:
    room.agents.takes_s[StartLease] = 10 * SETTINGS.lease_s
    starting = asyncio.ensure_future(room.leasing.request(ALICE, ONE))
    await room.beat_for(10 * SETTINGS.lease_s + 1.0)
    (grant,) = (await starting).grants
    assert grant.deadline_s > room.clock.now()
    assert _end_of(room, grant.lease) == (LeaseState.ACTIVE, None)


# holding ----------------------------------------------------------------------------------------------------
@in_a_room()
async def test_a_lease_that_nobody_renews_expires(room: Room) -> None:
    lease = await _lease(room)
    await room.beat_for(SETTINGS.lease_s + 2.0)
    assert _end_of(room, lease) == (LeaseState.ENDED, EndReason.EXPIRED)
    assert room.agents.running == {}


@in_a_room()
async def test_a_renewed_lease_lives_on_and_its_agent_knows(room: Room) -> None:
    lease = await _lease(room)
    for _ in range(5):
        await room.beat_for(20.0)
        reply = await room.leasing.renew(ALICE, [lease])
        assert reply.renewals[0].ok
    assert room.agents.orders(RenewLease)[-1].deadline_s == pytest.approx(room.clock.now() + 30.0)
    assert _end_of(room, lease)[0] is LeaseState.ACTIVE


@in_a_room()
async def test_renewing_a_lease_that_is_over_tells_why(room: Room) -> None:
    lease = await _lease(room)
    await room.tell_end(lease, EndReason.OUT_OF_MEMORY, "2.1 GiB of 1 GiB")
    (renewal,) = (await room.leasing.renew(ALICE, [lease])).renewals
    assert (renewal.ok, renewal.reason, renewal.detail) == (False, "out_of_memory", "2.1 GiB of 1 GiB")


@in_a_room()
async def test_clock_jumps_neither_expire_nor_prolong_leases(room: Room) -> None:
    lease = await _lease(room)
    room.clock.jump_s += 86400.0
    await room.beat_for(5.0)
    assert _end_of(room, lease)[0] is LeaseState.ACTIVE
    room.clock.jump_s -= 2 * 86400.0
    await room.beat_for(SETTINGS.lease_s)
    assert _end_of(room, lease)[1] is EndReason.EXPIRED


@in_a_room()
async def test_an_idle_lease_is_given_back(room: Room) -> None:
    lease = await _lease(room)
    await room.beat(idle_s=299.0)
    assert _end_of(room, lease)[0] is LeaseState.ACTIVE
    await room.beat(idle_s=301.0)
    await room.clock.sleep(0.1)
    assert _end_of(room, lease) == (LeaseState.ENDED, EndReason.IDLE)


@in_a_room()
async def test_an_idle_lease_goes_when_another_request_waits_for_its_cores(room: Room) -> None:
    idle = [await _lease(room) for _ in range(4)]
    await room.beat(idle_s=SETTINGS.idle_s)
    waiting = asyncio.create_task(room.leasing.request(BOB, _waiting(ONE, 20.0)))
    await room.clock.sleep(0.1)
    drained = [lease for lease in idle if _end_of(room, lease)[0] is LeaseState.DRAINING]
    assert len(drained) == 1
    await room.beat(idle_s=SETTINGS.idle_s)  # sent before the order arrived: a call may have come since
    assert _end_of(room, drained[0]) == (LeaseState.DRAINING, None)
    await room.beat(idle_s=SETTINGS.idle_s, draining=True)
    assert len((await waiting).grants) == 1
    assert _end_of(room, drained[0]) == (LeaseState.ENDED, EndReason.EVICTED)


@in_a_room()
async def test_a_lease_that_works_keeps_its_cores_from_others_of_its_class(room: Room) -> None:
    busy = [await _lease(room) for _ in range(4)]
    await room.beat(idle_s=0.9 * SETTINGS.idle_s)
    with pytest.raises(NoCapacityError):
        await room.leasing.request(BOB, _waiting(ONE, 1.0))
    assert {_end_of(room, lease)[0] for lease in busy} == {LeaseState.ACTIVE}


@in_a_room()
async def test_a_lease_ends_with_its_last_executor(room: Room) -> None:
    lease = await _lease(room)
    nested = await room.leasing.add_executor(ALICE, lease)
    first = room.leasing.lease(ALICE, lease).executors[0]
    for executor in (nested.executor.executor, first.executor):
        assert _end_of(room, lease)[0] is LeaseState.ACTIVE
        report = ExecutorEnded(
            lease=lease, executor=executor, reason=EndReason.EXITED, detail="signal SIGSEGV"
        )
        await room.leasing.agent_report(NodeId("n0"), report)
    await room.clock.sleep(0.1)
    ended = room.leasing.lease(ALICE, lease)
    assert (ended.end_reason, ended.end_detail) == (EndReason.EXITED, "signal SIGSEGV")


@in_a_room()
async def test_an_executor_can_be_killed_but_not_those_of_others(room: Room) -> None:
    lease = await _lease(room)
    executor = room.leasing.lease(ALICE, lease).executors[0].executor
    assert (await room.leasing.kill_executor(ALICE, lease, executor)).killed
    with pytest.raises(NotFoundError):
        await room.leasing.kill_executor(BOB, lease, ExecutorId("ex_1"))


@in_a_room()
async def test_nothing_can_be_added_to_a_lease_that_is_over(room: Room) -> None:
    lease = await _lease(room)
    await room.leasing.release(ALICE, lease)
    with pytest.raises(LeaseEndedError, match="released"):
        await room.leasing.add_executor(ALICE, lease)


# who may do what --------------------------------------------------------------------------------------------
@in_a_room()
async def test_tenants_do_not_see_each_other_and_operators_see_all(room: Room) -> None:
    lease = await _lease(room)
    assert room.leasing.leases(BOB, ended=True) == []
    for act in (room.leasing.lease, room.leasing.explain):
        with pytest.raises(NotFoundError):
            act(BOB, lease)
    with pytest.raises(NotFoundError):
        await room.leasing.release(BOB, lease)
    with pytest.raises(NotFoundError):
        await room.leasing.renew(BOB, [lease])
    assert [found.lease for found in room.leasing.leases(ADMIN, ended=False)] == [lease]


@in_a_room()
async def test_code_under_a_lease_may_add_executors_to_it_and_nothing_else(room: Room) -> None:
    lease, other = await _lease(room), await _lease(room)
    inside = Principal(tenant=ALICE.tenant, role="lease", lease=lease)
    assert (await room.leasing.add_executor(inside, lease)).executor.executor
    with pytest.raises(PermissionDeniedError):
        await room.leasing.request(inside, ONE)
    with pytest.raises(NotFoundError):
        await room.leasing.add_executor(inside, other)
    assert [found.lease for found in room.leasing.leases(inside, ended=False)] == [lease]


# nodes ------------------------------------------------------------------------------------------------------
@in_a_room(joined=False)
async def test_requests_wait_for_the_first_agent(room: Room) -> None:
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, _waiting(ONE)))
    await room.clock.sleep(3.0)
    assert not waiting.done()
    await room.join()
    assert len((await waiting).grants) == 1


@in_a_room(nodes=2)
async def test_only_a_leases_own_agent_tells_how_it_ended_and_what_it_used(room: Room) -> None:
    lease = await _lease(room)
    (other,) = [
        node.node for node in room.leasing.nodes() if node.node != room.leasing.lease(ADMIN, lease).node
    ]
    lie = LeaseEnded(lease=lease, reason=EndReason.EXITED, detail="a lie", usage=Usage(cpu_s=1e9))
    await room.leasing.agent_report(other, lie)
    assert _end_of(room, lease) == (LeaseState.ACTIVE, None)
    await room.tell_end(lease, EndReason.EXITED, usage=Usage(cpu_s=1.0))
    await room.leasing.agent_report(other, lie)
    assert room.leasing.lease(ADMIN, lease).usage.cpu_s == 1.0


@in_a_room()
async def test_an_agent_of_a_foreign_node_is_refused(room: Room) -> None:
    from tests.unit.leasing.rooms import hello, machines

    with pytest.raises(NotFoundError, match="n7"):
        await room.leasing.agent_joined(NodeId("n7"), hello(machines(8)[7]))


@in_a_room()
async def test_a_silent_agent_changes_nothing_until_its_leases_are_fenced(room: Room) -> None:
    lease = await _lease(room)
    room.agents.is_cut_off = True
    await room.leasing.agent_left(NodeId("n0"))
    assert room.leasing.nodes()[0].agent == "silent"
    with pytest.raises(NoCapacityError):
        await room.leasing.request(BOB, ONE)
    for _ in range(4):
        await room.clock.sleep(20.0)
        assert (await room.leasing.renew(ALICE, [lease])).renewals[0].ok, "unknown is not gone"
    await room.clock.sleep(SETTINGS.lease_s + SETTINGS.orphan_s - 1.0)
    assert _end_of(room, lease)[0] is not LeaseState.ENDED
    await room.clock.sleep(SETTINGS.agent_silence_s + 2.0)
    assert _end_of(room, lease)[0] is LeaseState.ENDED
    assert await room.platform.allocations() == {}


@in_a_room()
async def test_an_agent_that_hangs_is_silent_too(room: Room) -> None:
    await room.clock.sleep(SETTINGS.agent_silence_s + 1.0)
    assert room.leasing.nodes()[0].agent == "silent"
    await room.beat()
    assert room.leasing.nodes()[0].agent == "connected"


@in_a_room()
async def test_an_agent_that_comes_back_with_its_leases_goes_on_as_before(room: Room) -> None:
    lease = await _lease(room)
    await room.leasing.agent_left(NodeId("n0"))
    await room.clock.sleep(5.0)
    await room.join(_running(room, lease))
    await room.beat_for(5.0)
    assert _end_of(room, lease)[0] is LeaseState.ACTIVE
    assert room.agents.orders(RenewLease)[-1].lease == lease


@in_a_room()
async def test_an_agent_that_comes_back_without_a_lease_has_lost_it(room: Room) -> None:
    lease = await _lease(room)
    await room.leasing.agent_left(NodeId("n0"))
    room.agents.running.clear()
    await room.join()
    await room.clock.sleep(1.0)
    assert _end_of(room, lease) == (LeaseState.ENDED, EndReason.NODE_LOST)
    assert room.agents.orders(EndLease)[-1].lease == lease, "the agent confirms that nothing is left"


@in_a_room()
async def test_what_runs_without_a_lease_is_ended(room: Room) -> None:
    stray = LeaseId("ls_stray")
    await room.join(_running(room, stray))
    await room.clock.sleep(1.0)
    assert [order.lease for order in room.agents.orders(EndLease)] == [stray]


@in_a_room(nodes=2)
async def test_a_drained_node_loses_its_elastic_leases_after_their_grace(room: Room) -> None:
    reserved = await _lease(room, request=_waiting(ONE, 0.0, lease_class=LeaseClass.RESERVED))
    elastic = await _lease(room)
    node = room.leasing.lease(ALICE, elastic).node
    assert node is not None
    assert room.leasing.lease(ALICE, reserved).node == node
    await room.leasing.drain_node(node)
    assert (await room.leasing.renew(ALICE, [elastic])).renewals[0].draining
    await room.beat_for(SETTINGS.grace_s + 1.0)
    assert [order.lease for order in room.agents.orders(DrainLease)] == [elastic]
    assert _end_of(room, elastic) == (LeaseState.ENDED, EndReason.EVICTED)
    assert _end_of(room, reserved)[0] is LeaseState.ACTIVE
    assert room.leasing.lease(ALICE, await _lease(room)).node != node
    await room.leasing.resume_node(node)
    assert not any(found.draining for found in room.leasing.nodes())


PREEMPT = load_policies(
    "[[rule]]\nname='paid'\nthen='allow'\npreempt=true\nwhen='request.class == \"reserved\"'\n"
)


@in_a_room(policies=PREEMPT)
async def test_a_reserved_request_gets_the_cores_of_elastic_leases(room: Room) -> None:
    elastic = await _lease(room, BOB, FOUR)
    request = _waiting(ONE, lease_class=LeaseClass.RESERVED)
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, request))
    competitor = asyncio.ensure_future(room.leasing.request(BOB, _waiting(FOUR, 1.0)))
    await room.beat_for(4.0)
    assert len((await waiting).grants) == 1
    assert _end_of(room, elastic)[1] is EndReason.EVICTED
    with pytest.raises(NoCapacityError):
        await competitor


@in_a_room(nodes=2)
async def test_pools_keep_their_minimum_warm(room: Room) -> None:
    await room.clock.sleep(1.0)
    assert sorted(order.spares for order in room.agents.orders(Warm)) == [1, 2]
    await room.beat_for(5.0)
    assert len(room.agents.orders(Warm)) == 2, "told once"


@in_a_room()
async def test_an_allocation_that_the_platform_ended_ends_its_lease(room: Room) -> None:
    lease = await _lease(room)
    allocation = room.leasing.lease(ALICE, lease).allocation
    assert allocation is not None
    room.platform.preempt(allocation)
    await room.beat_for(11.0)
    assert _end_of(room, lease) == (LeaseState.ENDED, EndReason.NODE_LOST)


# restart ----------------------------------------------------------------------------------------------------
@in_a_room()
async def test_a_restarted_site_adopts_what_still_runs(room: Room) -> None:
    lease = await _lease(room)
    await room.platform.close()  # this platform forgets, as the local one does
    room.restart()
    await room.clock.sleep(0.6)
    await room.join(_running(room, lease))
    await room.beat_for(5.0)
    assert _end_of(room, lease)[0] is LeaseState.ACTIVE
    assert (await room.leasing.renew(ALICE, [lease])).renewals[0].ok
    with pytest.raises(NoCapacityError):
        await room.leasing.request(BOB, FOUR)
    assert len(await room.platform.allocations() or {}) == 1


@in_a_room()
async def test_a_start_that_the_site_did_not_live_to_see_is_undone(room: Room) -> None:
    starting = asyncio.Event()

    async def hang(node: NodeId, order: object) -> None:
        starting.set()
        await asyncio.Event().wait()

    room.agents.order, obedient = hang, room.agents.order  # type: ignore[assignment,method-assign]
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, ONE))
    await starting.wait()
    (lease,) = room.leasing.leases(ADMIN, ended=False)
    room.agents.order = obedient  # type: ignore[method-assign]
    room.restart()
    waiting.cancel()
    await asyncio.wait([waiting])
    await room.join(_running(room, lease.lease))
    await room.beat_for(2.0)
    assert _end_of(room, lease.lease) == (LeaseState.ENDED, EndReason.FAILED)


@in_a_room()
async def test_a_stopped_site_ends_all_leases_and_turns_requests_away(room: Room) -> None:
    lease = await _lease(room, request=FOUR)
    waiting = asyncio.ensure_future(room.leasing.request(BOB, _waiting(ONE)))
    await room.clock.sleep(0.1)
    await room.leasing.close()
    assert _end_of(room, lease) == (LeaseState.ENDED, EndReason.SITE_STOPPED)
    with pytest.raises(SiteUnavailableError):
        await waiting
    with pytest.raises(SiteUnavailableError):
        await room.leasing.request(BOB, ONE)


# telling ----------------------------------------------------------------------------------------------------
@in_a_room()
async def test_explanations_tell_the_decision_and_what_happened_since(room: Room) -> None:
    lease = await _lease(room)
    await room.leasing.release(ALICE, lease)
    explanation = room.leasing.explain(ALICE, lease)
    words = "\n".join(explanation.words)
    for part in ("alice asked for 1 elastic lease", "granted on n0", "Started -> active", "released"):
        assert part in words
    assert room.leasing.explain(ALICE, explanation.request).outcome == "grant"


@in_a_room()
async def test_a_dry_run_decides_and_changes_nothing(room: Room) -> None:
    strict = load_policies("[[rule]]\nname = 'no'\nthen = 'deny'\n")
    assert room.leasing.dry_run(ALICE, ONE).outcome == "grant"
    assert room.leasing.dry_run(ALICE, ONE, strict).outcome == "deny"
    assert room.leasing.leases(ADMIN, ended=True) == []
    await _lease(room)
    assert (await room.leasing.replay(strict)).changes[0].after.outcome == "deny"


@in_a_room()
async def test_a_dry_run_warms_nothing(room: Room) -> None:
    await room.clock.sleep(1.0)
    told = len(room.agents.orders(Warm))
    other = _waiting(ONE, 0.0, pool="warm", environment=Environment(preload=("json",)))
    room.leasing.dry_run(ALICE, other)
    await room.beat_for(2.0)
    assert len(room.agents.orders(Warm)) == told
    await room.leasing.request(ALICE, other)
    await room.beat_for(2.0)
    assert len(room.agents.orders(Warm)) > told


@in_a_room()
async def test_usage_is_billed_by_class_and_final_usage_counts_even_when_it_comes_late(room: Room) -> None:
    lease = await _lease(room)
    await room.beat(usage=Usage(allocated_core_s=1.0, calls=3))
    assert room.leasing.bill(ALICE)[0].calls == 3
    await room.leasing.release(ALICE, lease)
    await room.tell_end(lease, EndReason.RELEASED, usage=Usage(allocated_core_s=2.0, busy_s=1.5, calls=7))
    (row,) = room.leasing.bill(ALICE)
    assert (row.leases, row.allocated_core_s, row.busy_core_s, row.calls) == (1, 2.0, 1.5, 7)
    assert room.leasing.bill(BOB) == []
    assert room.leasing.bill(ADMIN)[0].calls == 7


@in_a_room()
async def test_functions_are_counted_over_executors_and_leases(room: Room) -> None:
    async def report(lease: LeaseId, *calls: int) -> None:
        uses = tuple(
            FunctionUse(name="embed", calls=n, errors=0, busy_s=n / 10, last_s=1.0 * n) for n in calls
        )
        report = LeaseReport(lease=lease, usage=Usage(), idle_s=0.0, functions=uses)
        await room.leasing.agent_report(NodeId("n0"), Heartbeat(leases=(report,)))

    lease = await _lease(room)
    await report(lease, 5, 2)
    await report(lease, 3)  # one executor is gone, and what it had counted with it
    await room.leasing.release(ALICE, lease)
    await report(await _lease(room), 10)
    (row,) = room.leasing.functions(ALICE)
    assert row.calls == 7 + 3 + 10
    assert room.leasing.functions(BOB) == []


def _running(room: Room, lease: LeaseId) -> RunningLease:
    known = room.agents.running.get(lease)
    return RunningLease(
        lease=lease, executors=(known,) if known else (), deadline_s=room.clock.now() + 30.0, usage=Usage()
    )


@in_a_room()
async def test_a_platform_that_does_not_answer_holds_up_no_decision(room: Room) -> None:
    lease = await _lease(room)
    room.platform.answers.clear()
    await room.clock.sleep(room.platform.survey_s + SETTINGS.lease_s + SETTINGS.grace_s + 1)
    assert _end_of(room, lease) == (LeaseState.ENDED, EndReason.EXPIRED)
    room.platform.answers.set()
