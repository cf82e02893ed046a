"""Whose turn it is at a real site: fair share, priorities, guarantees and budgets, in virtual time."""

import asyncio

import pytest

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import DeniedError
from isthmus.core.model import EndReason, LeaseClass, Principal, Resources, Usage
from isthmus.policy import load_policies
from tests.unit.leasing.rooms import ADMIN, ALICE, BOB, Room, in_a_room, limited

FOUR = Resources(cores=4)
PRIORITIES = load_policies(
    "[tenants.bob]\npriority = 1\n"
    "[[rule]]\nname = 'urgent'\nthen = 'hurry'\nby = 5\nwhen = 'request.policy == \"urgent\"'\n"
)
GUARANTEED = load_policies("[tenants.alice]\nguarantee = { cores = 4 }\n")


def _four(wait_s: float = 60.0, policy: str = "") -> LeaseRequest:
    return LeaseRequest(resources=FOUR, wait_s=wait_s, policy=policy)


async def _hold(room: Room, who: Principal) -> str:
    reply = await room.leasing.request(who, _four(0.0))
    return reply.grants[0].lease


async def _serve_all(room: Room, asking: list[tuple[Principal, str, str]]) -> list[str]:
    """All of them wait while somebody holds everything, then each gives back at once; the order served."""
    held = await _hold(room, ADMIN)
    served: list[str] = []

    async def ask(who: Principal, name: str, policy: str) -> None:
        reply = await room.leasing.request(who, _four(policy=policy))
        served.append(name)
        await room.leasing.release(who, reply.grants[0].lease)

    waiting = []
    for who, name, policy in asking:
        waiting.append(asyncio.ensure_future(ask(who, name, policy)))
        await room.clock.sleep(0.01)
    await room.leasing.release(ADMIN, held)
    await asyncio.gather(*waiting)
    return served


async def _use(room: Room, who: Principal, core_h: float) -> None:
    """A lease that was billed this much, and is over."""
    lease = await _hold(room, who)
    await room.beat(usage=Usage(allocated_core_s=core_h * 3600.0))
    await room.leasing.release(who, lease)


@in_a_room()
async def test_who_used_less_lately_is_served_first(room: Room) -> None:
    await _use(room, BOB, 10.0)
    assert await _serve_all(room, [(BOB, "b1", ""), (BOB, "b2", ""), (ALICE, "a1", "")]) == ["a1", "b1", "b2"]


@in_a_room()
async def test_what_tenants_used_is_remembered_over_a_restart(room: Room) -> None:
    await _use(room, BOB, 10.0)
    await room.beat_for(12.0)  # until it is written down
    room.restart()
    await room.clock.sleep(0.1)
    await room.join()
    assert await _serve_all(room, [(BOB, "b1", ""), (ALICE, "a1", "")]) == ["a1", "b1"]


@in_a_room(policies=PRIORITIES)
async def test_priority_comes_before_fair_share_also_within_a_tenant(room: Room) -> None:
    asking = [(ALICE, "a1", ""), (ALICE, "a2", "urgent"), (BOB, "b1", "")]
    assert await _serve_all(room, asking) == ["a2", "b1", "a1"]


@in_a_room(policies=GUARANTEED)
async def test_a_lender_gets_its_guarantee_back_and_the_reason_can_be_read(room: Room) -> None:
    borrowed = await _hold(room, BOB)
    waiting = asyncio.ensure_future(room.leasing.request(ALICE, _four()))
    await room.beat_for(4.0)
    reply = await waiting
    assert len(reply.grants) == 1
    ended = {lease.lease: lease.end_reason for lease in room.leasing.leases(ADMIN, ended=True)}
    assert ended[borrowed] is EndReason.EVICTED
    words = "\n".join(room.leasing.explain(ALICE, reply.grants[0].lease).words)
    assert "1 borrowing leases are asked to leave" in words
    assert borrowed not in words
    told = "\n".join(room.leasing.explain(ADMIN, reply.grants[0].lease).words)
    assert f"Asked to leave for it: {borrowed}." in told
    assert "Fair share: alice holds 0.00% of the site's cores" in words


@in_a_room()
async def test_who_else_waits_is_told_to_operators_only(room: Room) -> None:
    held = await _hold(room, ADMIN)
    waiting = [asyncio.ensure_future(room.leasing.request(BOB, _four()))]
    await room.clock.sleep(0.01)
    waiting.append(asyncio.ensure_future(room.leasing.request(ALICE, _four())))
    await room.clock.sleep(0.01)
    await room.leasing.release(ADMIN, held)
    lease = (await waiting[0]).grants[0].lease
    await room.leasing.release(BOB, lease)
    lease = (await waiting[1]).grants[0].lease
    request = room.leasing.explain(ALICE, lease).request
    for subject in (lease, request):
        assert "it waits bob" in "\n".join(room.leasing.explain(ADMIN, subject).words)
        assert "bob" not in repr(room.leasing.explain(ALICE, subject))


@in_a_room(policies=GUARANTEED)
async def test_a_reserved_lease_does_not_borrow(room: Room) -> None:
    request = LeaseRequest(resources=FOUR, lease_class=LeaseClass.RESERVED)
    with pytest.raises(Exception, match="guaranteed to alice"):
        await room.leasing.request(BOB, request)
    assert len((await room.leasing.request(ALICE, request)).grants) == 1


@in_a_room()
async def test_a_budget_of_core_hours_ends_with_what_was_billed(room: Room) -> None:
    alice = limited(core_hours=5, window_h=24)
    await _use(room, alice, 6.0)
    with pytest.raises(DeniedError, match=r"may use 5 core-hours in 24 h and used 6\.0"):
        await _hold(room, alice)
    await room.clock.sleep(25 * 3600.0)
    await room.join()
    await _hold(room, alice)
