"""What time, agents and restarts do to leases."""

import asyncio

import pytest

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import NoCapacityError, NotFoundError, SiteUnavailableError
from isthmus.core.ids import AllocationId, LeaseId, NodeId
from isthmus.core.model import EndReason, LeaseClass, LeaseState, Resources, Usage
from isthmus.node.messages import (
    DrainLease,
    EndLease,
    ExecutorEnded,
    LeaseEnded,
    RenewLease,
    StartLease,
    Warm,
)
from isthmus.platforms.platform import Allocation
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
    hello,
    in_a_room,
    limited,
    machines,
    patient,
    running_lease,
)


# time -------------------------------------------------------------------------------------------------------
@in_a_room()
async def test_a_lease_that_nobody_renews_expires(room: Room) -> None:
    lease = await granted(room)
    await room.beat_for(SETTINGS.lease_s + 2.0)
    assert end_of(room, lease) == (LeaseState.ENDED, EndReason.EXPIRED)
    assert room.agents.running == {}


@in_a_room()
async def test_a_renewed_lease_lives_on_and_its_agent_knows(room: Room) -> None:
    lease = await granted(room)
    for _ in range(5):
        await room.beat_for(20.0)
        reply = await room.leasing.renew(ALICE, [lease])
        assert reply.renewals[0].ok
    assert room.agents.orders(RenewLease)[-1].deadline_s == pytest.approx(room.clock.now() + 30.0)
    assert end_of(room, lease)[0] is LeaseState.ACTIVE


@in_a_room()
async def test_clock_jumps_neither_expire_nor_prolong_leases(room: Room) -> None:
    lease = await granted(room)
    room.clock.jump_s += 86400.0
    await room.beat_for(5.0)
    assert end_of(room, lease)[0] is LeaseState.ACTIVE
    room.clock.jump_s -= 2 * 86400.0
    await room.beat_for(SETTINGS.lease_s)
    assert end_of(room, lease)[1] is EndReason.EXPIRED


@in_a_room()
async def test_a_start_may_take_longer_than_a_lease_lives(room: Room) -> None:
    room.agents.takes_s[StartLease] = 10 * SETTINGS.lease_s
    starting = asyncio.ensure_future(room.leasing.request(ALICE, ONE))
    await room.beat_for(10 * SETTINGS.lease_s + 1.0)
    (grant,) = (await starting).grants
    assert grant.deadline_s > room.clock.now()
    assert end_of(room, grant.lease) == (LeaseState.ACTIVE, None)


@in_a_room()
async def test_an_idle_lease_is_given_back(room: Room) -> None:
    lease = await granted(room)
    await room.beat(idle_s=299.0)
    assert end_of(room, lease)[0] is LeaseState.ACTIVE
    await room.beat(idle_s=301.0)
    await room.clock.sleep(0.1)
    assert end_of(room, lease) == (LeaseState.ENDED, EndReason.IDLE)


@in_a_room()
async def test_an_idle_lease_goes_when_another_request_waits_for_its_cores(room: Room) -> None:
    idle = [await granted(room) for _ in range(4)]
    await room.beat(idle_s=SETTINGS.idle_s)
    waiting = asyncio.create_task(room.leasing.request(BOB, patient(ONE, 20.0)))
    await room.clock.sleep(0.1)
    drained = [lease for lease in idle if end_of(room, lease)[0] is LeaseState.DRAINING]
    assert len(drained) == 1
    await room.beat(idle_s=SETTINGS.idle_s)  # sent before the order arrived: a call may have come since
    assert end_of(room, drained[0]) == (LeaseState.DRAINING, None)
    await room.beat(idle_s=SETTINGS.idle_s, draining=True)
    assert len((await waiting).grants) == 1
    assert end_of(room, drained[0]) == (LeaseState.ENDED, EndReason.EVICTED)


@in_a_room()
async def test_a_lease_that_works_keeps_its_cores_from_others_of_its_class(room: Room) -> None:
    busy = [await granted(room) for _ in range(4)]
    await room.beat(idle_s=0.9 * SETTINGS.idle_s)
    with pytest.raises(NoCapacityError):
        await room.leasing.request(BOB, patient(ONE, 1.0))
    assert {end_of(room, lease)[0] for lease in busy} == {LeaseState.ACTIVE}


# nodes ------------------------------------------------------------------------------------------------------
@in_a_room(joined=False)
async def test_requests_wait_for_the_first_agent(room: Room) -> None:
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, patient(ONE)))
    await room.clock.sleep(3.0)
    assert not waiting.done()
    await room.join()
    assert len((await waiting).grants) == 1


@in_a_room(nodes=2)
async def test_only_a_leases_own_agent_tells_how_it_ended_and_what_it_used(room: Room) -> None:
    lease = await granted(room)
    (other,) = [
        node.node for node in room.leasing.nodes() if node.node != room.leasing.lease(ADMIN, lease).node
    ]
    lie = LeaseEnded(lease=lease, reason=EndReason.EXITED, detail="a lie", usage=Usage(cpu_s=1e9))
    await room.leasing.agent_report(other, lie)
    assert end_of(room, lease) == (LeaseState.ACTIVE, None)
    await room.tell_end(lease, EndReason.EXITED, usage=Usage(cpu_s=1.0))
    await room.leasing.agent_report(other, lie)
    assert room.leasing.lease(ADMIN, lease).usage.cpu_s == 1.0


@in_a_room()
async def test_a_lease_ends_with_its_last_executor(room: Room) -> None:
    lease = await granted(room)
    nested = await room.leasing.add_executor(ALICE, lease)
    first = room.leasing.lease(ALICE, lease).executors[0]
    for executor in (nested.executor.executor, first.executor):
        assert end_of(room, lease)[0] is LeaseState.ACTIVE
        report = ExecutorEnded(
            lease=lease, executor=executor, reason=EndReason.EXITED, detail="signal SIGSEGV"
        )
        await room.leasing.agent_report(NodeId("n0"), report)
    await room.clock.sleep(0.1)
    ended = room.leasing.lease(ALICE, lease)
    assert (ended.end_reason, ended.end_detail) == (EndReason.EXITED, "signal SIGSEGV")


@in_a_room()
async def test_an_agent_of_a_foreign_node_is_refused(room: Room) -> None:
    with pytest.raises(NotFoundError, match="n7"):
        await room.leasing.agent_joined(NodeId("n7"), hello(machines(8)[7]))


@in_a_room()
async def test_a_silent_agent_changes_nothing_until_its_leases_are_fenced(room: Room) -> None:
    lease = await granted(room)
    room.agents.is_cut_off = True
    await room.leasing.agent_left(NodeId("n0"))
    assert room.leasing.nodes()[0].agent == "silent"
    with pytest.raises(NoCapacityError):
        await room.leasing.request(BOB, ONE)
    for _ in range(4):
        await room.clock.sleep(20.0)
        assert (await room.leasing.renew(ALICE, [lease])).renewals[0].ok, "unknown is not gone"
    await room.clock.sleep(SETTINGS.lease_s + SETTINGS.orphan_s - 1.0)
    assert end_of(room, lease)[0] is not LeaseState.ENDED
    await room.clock.sleep(SETTINGS.agent_silence_s + 2.0)
    assert end_of(room, lease)[0] is LeaseState.ENDED
    assert await room.platform.allocations() == {}


@in_a_room()
async def test_an_agent_that_hangs_is_silent_too(room: Room) -> None:
    await room.clock.sleep(SETTINGS.agent_silence_s + 1.0)
    assert room.leasing.nodes()[0].agent == "silent"
    await room.beat()
    assert room.leasing.nodes()[0].agent == "connected"


@in_a_room()
async def test_an_agent_that_comes_back_with_its_leases_goes_on_as_before(room: Room) -> None:
    lease = await granted(room)
    await room.leasing.agent_left(NodeId("n0"))
    await room.clock.sleep(5.0)
    await room.join(running_lease(room, lease))
    await room.beat_for(5.0)
    assert end_of(room, lease)[0] is LeaseState.ACTIVE
    assert room.agents.orders(RenewLease)[-1].lease == lease


@in_a_room()
async def test_an_agent_that_comes_back_without_a_lease_has_lost_it(room: Room) -> None:
    lease = await granted(room)
    await room.leasing.agent_left(NodeId("n0"))
    room.agents.running.clear()
    await room.join()
    await room.clock.sleep(1.0)
    assert end_of(room, lease) == (LeaseState.ENDED, EndReason.NODE_LOST)
    assert room.agents.orders(EndLease)[-1].lease == lease, "the agent confirms that nothing is left"


@in_a_room()
async def test_what_runs_without_a_lease_is_ended(room: Room) -> None:
    stray = LeaseId("ls_stray")
    await room.join(running_lease(room, stray))
    await room.clock.sleep(1.0)
    assert [order.lease for order in room.agents.orders(EndLease)] == [stray]


@in_a_room(nodes=2)
async def test_a_drained_node_loses_its_elastic_leases_after_their_grace(room: Room) -> None:
    reserved = await granted(room, request=patient(ONE, 0.0, lease_class=LeaseClass.RESERVED))
    elastic = await granted(room)
    node = room.leasing.lease(ALICE, elastic).node
    assert node is not None
    assert room.leasing.lease(ALICE, reserved).node == node
    await room.leasing.drain_node(node)
    assert (await room.leasing.renew(ALICE, [elastic])).renewals[0].draining
    await room.beat_for(SETTINGS.grace_s + 1.0)
    assert [order.lease for order in room.agents.orders(DrainLease)] == [elastic]
    assert end_of(room, elastic) == (LeaseState.ENDED, EndReason.EVICTED)
    assert end_of(room, reserved)[0] is LeaseState.ACTIVE
    assert room.leasing.lease(ALICE, await granted(room)).node != node
    await room.leasing.resume_node(node)
    assert not any(found.draining for found in room.leasing.nodes())


@in_a_room(nodes=2)
async def test_pools_keep_their_minimum_warm(room: Room) -> None:
    await room.clock.sleep(1.0)
    assert sorted(order.spares for order in room.agents.orders(Warm)) == [1, 2]
    await room.beat_for(5.0)
    assert len(room.agents.orders(Warm)) == 2, "told once"


@in_a_room()
async def test_an_allocation_that_the_platform_ended_ends_its_lease(room: Room) -> None:
    lease = await granted(room)
    allocation = room.leasing.lease(ALICE, lease).allocation
    assert allocation is not None
    room.platform.preempt(allocation)
    await room.beat_for(11.0)
    assert end_of(room, lease) == (LeaseState.ENDED, EndReason.NODE_LOST)


class Inquiry:
    """Platform.fate, with a note of who asks, and of how many ask at the same time."""

    def __init__(self, room: Room) -> None:
        self.asked: list[AllocationId] = []
        self.asking = self.asking_max = 0
        self._fate = room.platform.fate
        room.platform.fate = self.fate  # type: ignore[method-assign]

    async def fate(self, allocation: AllocationId, node: NodeId) -> Allocation | None:
        self.asked.append(allocation)
        self.asking += 1
        self.asking_max = max(self.asking, self.asking_max)
        await asyncio.sleep(0.1)
        self.asking -= 1
        return await self._fate(allocation, node)


@in_a_room(nodes=2)
async def test_what_ended_a_nodes_allocations_is_asked_for_all_of_its_leases_together(room: Room) -> None:
    leases = [await granted(room) for _ in range(8)]
    inquiry = Inquiry(room)
    for allocation in await room.platform.allocations() or {}:
        room.platform.preempt(allocation)
    await room.beat_for(11.0)
    assert {end_of(room, lease) for lease in leases} == {(LeaseState.ENDED, EndReason.NODE_LOST)}
    assert inquiry.asking_max == 4
    assert len(inquiry.asked) == len(set(inquiry.asked)) == 8


@in_a_room()
async def test_nobody_asks_what_ended_a_lease_that_is_still_being_started(room: Room) -> None:
    room.agents.takes_s[StartLease] = 15.0
    starting = asyncio.create_task(granted(room))
    await room.clock.sleep(0.1)
    inquiry = Inquiry(room)
    for allocation in await room.platform.allocations() or {}:
        room.platform.preempt(allocation)
    await room.beat_for(12.0)
    assert inquiry.asked == []
    starting.cancel()


@in_a_room()
async def test_an_allocation_that_is_wanted_back_is_handed_over_within_the_grace(room: Room) -> None:
    lease = await granted(room)
    allocation = room.leasing.lease(ALICE, lease).allocation
    assert allocation is not None
    room.platform.want_back(allocation, "others wait for its node")
    await room.beat_for(room.platform.survey_s + SETTINGS.grace_s + 2)
    assert end_of(room, lease) == (LeaseState.ENDED, EndReason.EVICTED)
    words = room.leasing.explain(ALICE, lease).words
    assert any("DrainOrdered" in line and "others wait for its node" in line for line in words)


@in_a_room()
async def test_the_platform_is_told_what_waits_for_room_and_that_it_waits_no_more(room: Room) -> None:
    await granted(room, request=LeaseRequest(resources=Resources(cores=4)))
    more = LeaseRequest(resources=Resources(cores=3), wait_s=1.0)
    waiting = asyncio.create_task(granted(room, request=more))
    await room.clock.sleep(0.5)
    assert [one.cores for one in room.platform.wanted] == [3]
    with pytest.raises(NoCapacityError):
        await waiting
    assert room.platform.wanted == ()


@in_a_room()
async def test_the_platform_is_told_when_room_is_all_that_a_waiting_request_still_lacks(room: Room) -> None:
    alice = limited(cores=4)
    own = await granted(room, alice, LeaseRequest(resources=Resources(cores=2)))
    waiting = asyncio.create_task(granted(room, alice, patient(LeaseRequest(resources=Resources(cores=3)))))
    await room.clock.sleep(0.5)
    assert room.platform.wanted == (), "its quota holds it back"
    await granted(room, BOB, LeaseRequest(resources=Resources(cores=2)))
    await room.leasing.release(alice, own)
    await room.clock.sleep(2 * SETTINGS.tick_s)
    assert [one.cores for one in room.platform.wanted] == [3]
    waiting.cancel()


@in_a_room()
async def test_a_platform_that_does_not_answer_holds_up_no_decision(room: Room) -> None:
    lease = await granted(room)
    room.platform.answers.clear()
    await room.clock.sleep(room.platform.survey_s + SETTINGS.lease_s + SETTINGS.grace_s + 1)
    assert end_of(room, lease) == (LeaseState.ENDED, EndReason.EXPIRED)
    room.platform.answers.set()


# restart ----------------------------------------------------------------------------------------------------
@in_a_room()
async def test_a_restarted_site_adopts_what_still_runs(room: Room) -> None:
    lease = await granted(room)
    await room.platform.close()  # this platform forgets, as the local one does
    room.restart()
    await room.clock.sleep(0.6)
    await room.join(running_lease(room, lease))
    await room.beat_for(5.0)
    assert end_of(room, lease)[0] is LeaseState.ACTIVE
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
    await room.join(running_lease(room, lease.lease))
    await room.beat_for(2.0)
    assert end_of(room, lease.lease) == (LeaseState.ENDED, EndReason.FAILED)


@in_a_room()
async def test_a_stopped_site_ends_all_leases_and_turns_requests_away(room: Room) -> None:
    lease = await granted(room, request=FOUR)
    waiting = asyncio.ensure_future(room.leasing.request(BOB, patient(ONE)))
    await room.clock.sleep(0.1)
    await room.leasing.close()
    assert end_of(room, lease) == (LeaseState.ENDED, EndReason.SITE_STOPPED)
    with pytest.raises(SiteUnavailableError):
        await waiting
    with pytest.raises(SiteUnavailableError):
        await room.leasing.request(BOB, ONE)
