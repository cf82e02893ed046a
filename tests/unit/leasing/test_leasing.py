"""What is asked for, granted, given back and told."""

import asyncio

import msgspec
import pytest

from isthmus.core import tokens
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
from isthmus.core.model import EndReason, Environment, LeaseClass, LeaseState, Principal, Usage
from isthmus.node.messages import EndLease, FunctionUse, Heartbeat, LeaseReport, StartLease, Warm
from isthmus.policy import load_policies
from tests.unit.leasing.rooms import (
    ADMIN,
    ALICE,
    BOB,
    FOUR,
    ONE,
    SETTINGS,
    Room,
    end_of,
    granted,
    in_a_room,
    limited,
    patient,
)


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
    assert end_of(room, grant.lease) == (LeaseState.ACTIVE, None)


@in_a_room()
async def test_a_request_that_finds_nothing_free_is_told_so_at_once(room: Room) -> None:
    await room.leasing.request(BOB, FOUR)
    with pytest.raises(NoCapacityError, match="isthmus explain rq_"):
        await room.leasing.request(ALICE, ONE)


@in_a_room()
async def test_fewer_than_asked_are_granted_with_the_reason(room: Room) -> None:
    reply = await room.leasing.request(ALICE, patient(ONE, 0.0, count=9))
    assert len(reply.grants) == 4
    assert "4 of 9" in reply.explanation


@in_a_room()
async def test_a_request_waits_until_somebody_gives_back(room: Room) -> None:
    held = await granted(room, BOB, FOUR)
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, patient(ONE)))
    await room.beat_for(5.0)
    assert room.leasing.requests_waiting == 1
    await room.leasing.release(BOB, held)
    reply = await waiting
    assert len(reply.grants) == 1
    assert room.leasing.requests_waiting == 0


@in_a_room()
async def test_a_request_that_waited_in_vain_is_refused_when_its_time_is_up(room: Room) -> None:
    await granted(room, BOB, FOUR)
    started = room.loop.time()
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, patient(ONE, 7.0)))
    await room.beat_for(8.0)
    with pytest.raises(NoCapacityError):
        await waiting
    assert room.loop.time() - started < 9.0
    assert room.leasing.requests_waiting == 0


@in_a_room()
async def test_the_queue_is_bounded(room: Room) -> None:
    await granted(room, BOB, FOUR)
    waiting = [asyncio.ensure_future(room.leasing.request(ALICE, patient(ONE, 3.0))) for _ in range(3)]
    await room.clock.sleep(0.1)
    with pytest.raises(NoCapacityError, match="queue_max"):
        await room.leasing.request(ALICE, patient(ONE, 3.0))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, NoCapacityError) for result in results)


@in_a_room()
async def test_a_tenant_that_fills_the_queue_keeps_no_other_out(room: Room) -> None:
    held = await granted(room, ADMIN, FOUR)
    alices = [asyncio.ensure_future(room.leasing.request(ALICE, patient(ONE))) for _ in range(3)]
    await room.clock.sleep(0.1)
    bobs = asyncio.ensure_future(room.leasing.request(BOB, patient(ONE)))
    await room.clock.sleep(0.1)
    with pytest.raises(NoCapacityError, match="queue_max"):
        await alices.pop()
    with pytest.raises(NoCapacityError, match="queue_max"):  # now Alice is not far ahead any more
        await asyncio.gather(*(room.leasing.request(BOB, patient(ONE)) for _ in range(2)))
    await room.leasing.release(ADMIN, held)
    assert len((await bobs).grants) == 1
    for alice in alices:
        assert len((await alice).grants) == 1


@in_a_room(settings=msgspec.structs.replace(SETTINGS, queue_max=4))
async def test_a_request_that_does_not_wait_takes_nobodys_place_in_the_queue(room: Room) -> None:
    held = await granted(room, ADMIN, FOUR)
    alices = [asyncio.ensure_future(room.leasing.request(ALICE, patient(ONE)))]
    bobs = [asyncio.ensure_future(room.leasing.request(BOB, patient(ONE))) for _ in range(3)]
    await room.clock.sleep(0.1)
    with pytest.raises(NoCapacityError, match="alice wait before it, longer than its wait_s=0"):
        await room.leasing.request(ALICE, ONE)
    await room.leasing.release(ADMIN, held)
    assert [len(reply.grants) for reply in await asyncio.gather(*alices, *bobs)] == [1, 1, 1, 1]


@in_a_room()
async def test_tenants_take_turns_and_each_is_served_in_order(room: Room) -> None:
    held = await granted(room, ADMIN, FOUR)
    served: list[str] = []

    async def ask(who: Principal, name: str) -> None:
        reply = await room.leasing.request(who, patient(FOUR))
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
    held = await granted(room, BOB, FOUR)
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, patient(ONE)))
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
        await room.leasing.request(ALICE, patient(ONE, 0.0, count=5, together=True))
    await room.clock.sleep(1.0)
    assert room.agents.running == {}
    assert {lease.end_reason for lease in room.leasing.leases(ADMIN, ended=True)} == {EndReason.FAILED}
    assert len((await room.leasing.request(ALICE, patient(ONE, 0.0, count=8, together=True))).grants) == 8


@in_a_room()
async def test_without_together_what_started_is_granted(room: Room) -> None:
    room.agents.fail_next[StartLease] = [FunctionLoadError("no module named torch")]
    reply = await room.leasing.request(ALICE, patient(ONE, 0.0, count=3))
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
    for request in (patient(ONE, 0.0, count=0), patient(ONE, -1.0)):
        with pytest.raises(InvalidRequestError):
            await room.leasing.request(ALICE, request)


@in_a_room()
async def test_quota_denies_and_pools_limit(room: Room) -> None:
    await room.leasing.request(limited(leases=1), ONE)
    with pytest.raises(DeniedError, match="may hold 1 leases"):
        await room.leasing.request(limited(leases=1), ONE)
    assert len((await room.leasing.request(BOB, patient(ONE, 0.0, pool="two", count=3))).grants) == 2


PREEMPT = load_policies(
    "[[rule]]\nname='paid'\nthen='allow'\npreempt=true\nwhen='request.class == \"reserved\"'\n"
)


@in_a_room(policies=PREEMPT)
async def test_a_reserved_request_gets_the_cores_of_elastic_leases(room: Room) -> None:
    elastic = await granted(room, BOB, FOUR)
    request = patient(ONE, lease_class=LeaseClass.RESERVED)
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, request))
    competitor = asyncio.ensure_future(room.leasing.request(BOB, patient(FOUR, 1.0)))
    await room.beat_for(4.0)
    assert len((await waiting).grants) == 1
    assert end_of(room, elastic)[1] is EndReason.EVICTED
    with pytest.raises(NoCapacityError):
        await competitor


# holding ----------------------------------------------------------------------------------------------------
@in_a_room()
async def test_renewing_a_lease_that_is_over_tells_why(room: Room) -> None:
    lease = await granted(room)
    await room.tell_end(lease, EndReason.OUT_OF_MEMORY, "2.1 GiB of 1 GiB")
    (renewal,) = (await room.leasing.renew(ALICE, [lease])).renewals
    assert (renewal.ok, renewal.reason, renewal.detail) == (False, "out_of_memory", "2.1 GiB of 1 GiB")


@in_a_room()
async def test_an_executor_can_be_killed_but_not_those_of_others(room: Room) -> None:
    lease = await granted(room)
    executor = room.leasing.lease(ALICE, lease).executors[0].executor
    assert (await room.leasing.kill_executor(ALICE, lease, executor)).killed
    with pytest.raises(NotFoundError):
        await room.leasing.kill_executor(BOB, lease, ExecutorId("ex_1"))


@in_a_room()
async def test_nothing_can_be_added_to_a_lease_that_is_over(room: Room) -> None:
    lease = await granted(room)
    await room.leasing.release(ALICE, lease)
    with pytest.raises(LeaseEndedError, match="released"):
        await room.leasing.add_executor(ALICE, lease)


# who may do what --------------------------------------------------------------------------------------------
@in_a_room()
async def test_tenants_do_not_see_each_other_and_operators_see_all(room: Room) -> None:
    lease = await granted(room)
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
    lease, other = await granted(room), await granted(room)
    inside = Principal(tenant=ALICE.tenant, role="lease", lease=lease)
    assert (await room.leasing.add_executor(inside, lease)).executor.executor
    with pytest.raises(PermissionDeniedError):
        await room.leasing.request(inside, ONE)
    with pytest.raises(NotFoundError):
        await room.leasing.add_executor(inside, other)
    assert [found.lease for found in room.leasing.leases(inside, ended=False)] == [lease]


# telling ----------------------------------------------------------------------------------------------------
@in_a_room()
async def test_explanations_tell_the_decision_and_what_happened_since(room: Room) -> None:
    lease = await granted(room)
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
    await granted(room)
    assert (await room.leasing.replay(strict)).changes[0].after.outcome == "deny"


@in_a_room()
async def test_a_dry_run_warms_nothing(room: Room) -> None:
    await room.clock.sleep(1.0)
    told = len(room.agents.orders(Warm))
    other = patient(ONE, 0.0, pool="warm", environment=Environment(preload=("json",)))
    room.leasing.dry_run(ALICE, other)
    await room.beat_for(2.0)
    assert len(room.agents.orders(Warm)) == told
    await room.leasing.request(ALICE, other)
    await room.beat_for(2.0)
    assert len(room.agents.orders(Warm)) > told


@in_a_room()
async def test_usage_is_billed_by_class_and_final_usage_counts_even_when_it_comes_late(room: Room) -> None:
    lease = await granted(room)
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

    lease = await granted(room)
    await report(lease, 5, 2)
    await report(lease, 3)  # one executor is gone, and what it had counted with it
    await room.leasing.release(ALICE, lease)
    await report(await granted(room), 10)
    (row,) = room.leasing.functions(ALICE)
    assert row.calls == 7 + 3 + 10
    assert room.leasing.functions(BOB) == []
