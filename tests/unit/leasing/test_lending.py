"""Nodes that batch jobs lend: they come with their agent, shrink and grow with the job, and go with it."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import pytest

from isthmus.core.api import LeaseRequest
from isthmus.core.errors import NoCapacityError, NotFoundError
from isthmus.core.ids import NodeId
from isthmus.core.model import EndReason, LeaseClass, LeaseState, Resources
from isthmus.leasing.inventory import LENT_SILENCE_S, lent_node
from isthmus.node.messages import Heartbeat, StartLease
from isthmus.node.owners import Lent
from isthmus.node.slack import Slack
from isthmus.policy import load_policies
from isthmus.policy.snapshot import NodeRow
from tests.unit.leasing.rooms import ADMIN, ALICE, Room, hello, in_a_room

GIB = 2**30
LENT = Lent(job="7", node="n0", cores=4, memory_bytes=8 * GIB, held_bytes=8 * GIB, partition="batch")
NODE = NodeId("n0.job7")
HARVESTED = LeaseRequest(resources=Resources(cores=2), lease_class=LeaseClass.HARVESTED)


async def _lend(room: Room, idle_cores: int = 4, name: NodeId = NODE, lent: Lent = LENT) -> None:
    await room.leasing.agent_joined(name, msgspec.structs.replace(hello(lent_node(name, lent)), lent=lent))
    await _say_slack(room, idle_cores, name)


async def _say_slack(room: Room, idle_cores: int, name: NodeId = NODE) -> None:
    await room.leasing.agent_report(name, Heartbeat(leases=(), slack=Slack(idle_cores, 8 * GIB)))


@in_a_room()
async def test_a_harvested_lease_comes_from_a_job_that_lends_not_from_the_platform(
    room: Room,
) -> None:
    await _lend(room)
    (grant,) = (await room.leasing.request(ALICE, HARVESTED)).grants
    lease = room.leasing.lease(ADMIN, grant.lease)
    assert (grant.node, grant.lease_class, lease.allocation) == (NODE, LeaseClass.HARVESTED, None)
    assert room.agents.orders(StartLease)[-1].lease_class is LeaseClass.HARVESTED
    assert await room.platform.allocations() == {}
    await room.leasing.release(ALICE, grant.lease)
    assert room.leasing.lease(ADMIN, grant.lease).end_reason is EndReason.RELEASED


@in_a_room()
async def test_nothing_of_a_job_is_free_before_its_agent_has_measured(room: Room) -> None:
    await _lend(room, idle_cores=0)
    with pytest.raises(NoCapacityError, match="most free cores on one node: 0"):
        await room.leasing.request(ALICE, HARVESTED)


@in_a_room()
async def test_who_waits_is_served_when_the_owner_falls_idle(room: Room) -> None:
    await _lend(room, idle_cores=1)
    waiting = msgspec.structs.replace(HARVESTED, wait_s=20.0)
    request = asyncio.ensure_future(room.leasing.request(ALICE, waiting))
    await room.clock.sleep(2.0)
    assert not request.done()
    await _say_slack(room, 2)
    assert (await request).grants[0].node == NODE
    node = next(node for node in room.leasing.nodes() if node.node == NODE)
    assert (node.cores, node.other_cores, node.labels["partition"]) == (4, 2, "batch")


@in_a_room()
async def test_slack_that_shrinks_and_grows_is_booked_beside_the_leases(room: Room) -> None:
    await _lend(room)
    await room.leasing.request(ALICE, HARVESTED)
    for idle_cores in (0, 3, 1, 4):
        await _say_slack(room, idle_cores)
    await room.leasing.request(ALICE, HARVESTED)
    with pytest.raises(NoCapacityError):
        await room.leasing.request(ALICE, HARVESTED)


@in_a_room()
async def test_when_the_job_ends_its_node_goes_and_its_leases_were_evicted(room: Room) -> None:
    await _lend(room)
    (grant,) = (await room.leasing.request(ALICE, HARVESTED)).grants
    await room.leasing.agent_left(NODE)
    await room.beat_for(LENT_SILENCE_S + 2.0)
    lease = room.leasing.lease(ADMIN, grant.lease)
    assert lease.end_reason is EndReason.EVICTED
    assert "the job that lent n0.job7 has ended" in lease.end_detail
    assert NODE not in {node.node for node in room.leasing.nodes()}


@in_a_room()
async def test_an_agent_that_dials_again_soon_loses_nothing(room: Room) -> None:
    await _lend(room)
    await room.leasing.request(ALICE, HARVESTED)
    await room.leasing.agent_left(NODE)
    await room.clock.sleep(LENT_SILENCE_S - 1.0)
    await _lend(room)
    assert NODE in {node.node for node in room.leasing.nodes()}


@in_a_room()
async def test_the_table_of_nodes_is_made_anew_once_whatever_comes_back_or_goes(room: Room) -> None:
    books = room.leasing._books
    sizes: list[int] = []

    def counted(rows: Sequence[NodeRow], set_nodes: Callable[[Sequence[NodeRow]], None]) -> None:
        sizes.append(len(rows))
        set_nodes(rows)

    names = [NodeId(f"n0.job{number}") for number in range(3)]
    for name in names:
        await _lend(room, name=name)
    books.set_nodes = partial(counted, set_nodes=books.set_nodes)  # type: ignore[method-assign]
    for name in names:
        await _lend(room, name=name)
        await room.leasing.agent_left(name)
    await room.beat_for(LENT_SILENCE_S + 2.0)
    assert sizes == [1]


@in_a_room()
async def test_no_job_may_lend_a_node_that_is_not_its_own(room: Room) -> None:
    with pytest.raises(NotFoundError, match="'n0' is a node of its own"):
        await _lend(room, name=NodeId("n0"))


CAPPED = load_policies(
    "[[rule]]\nname = 'two by day'\nthen = 'harvest'\ncores = 2\nwhen = 'job.partition == \"batch\"'\n"
    "[[rule]]\nname = 'none when dirty'\nthen = 'protect'\n"
    "when = 'has(signal.carbon) && signal.carbon > 400.0'\n"
)


@in_a_room(policies=CAPPED)
async def test_rules_leave_less_of_a_job_than_it_lends(room: Room) -> None:
    await _lend(room)
    assert len((await room.leasing.request(ALICE, HARVESTED)).grants) == 1
    with pytest.raises(NoCapacityError):
        await room.leasing.request(ALICE, HARVESTED)


SECOND = NodeId("n1.job7")


async def _lend_both(room: Room) -> None:
    """One job, on two nodes."""
    await _lend(room)
    await _lend(room, name=SECOND, lent=msgspec.structs.replace(LENT, node="n1"))


@in_a_room(policies=CAPPED)
async def test_a_limit_per_job_counts_all_nodes_of_the_job(room: Room) -> None:
    await _lend(room)
    await room.leasing.request(ALICE, HARVESTED)
    await _lend_both(room)
    with pytest.raises(NoCapacityError):
        await room.leasing.request(ALICE, HARVESTED)


@in_a_room(policies=CAPPED)
async def test_of_two_nodes_beyond_a_limit_that_they_share_one_keeps_its_leases(room: Room) -> None:
    await _lend_both(room)
    leases = [(await room.leasing.request(ALICE, HARVESTED)).grants[0].lease for _ in range(2)]
    for name in (NODE, SECOND, NODE):
        await _say_slack(room, 4, name)
    states = [room.leasing.lease(ADMIN, lease).state for lease in leases]
    assert sorted(states) == [LeaseState.ACTIVE, LeaseState.DRAINING]


PRODUCTION = load_policies(
    "[[rule]]\nname = 'left alone'\nthen = 'protect'\n"
    'when = \'job.name.startsWith("prod-") || job.qos == "urgent"\'\n'
)


@in_a_room(policies=PRODUCTION)
async def test_rules_know_a_job_by_its_name_and_its_quality_of_service(room: Room) -> None:
    await _lend(room, lent=msgspec.structs.replace(LENT, name="prod-cfd"))
    await _lend(room, name=NodeId("n0.job8"), lent=msgspec.structs.replace(LENT, job="8", qos="urgent"))
    with pytest.raises(NoCapacityError):
        await room.leasing.request(ALICE, HARVESTED)
    await _lend(room, name=NodeId("n0.job9"), lent=msgspec.structs.replace(LENT, job="9", name="test"))
    assert (await room.leasing.request(ALICE, HARVESTED)).grants[0].node == "n0.job9"


@in_a_room(policies=CAPPED)
async def test_leases_go_when_rules_come_to_protect_their_job(room: Room) -> None:
    await _lend(room)
    (grant,) = (await room.leasing.request(ALICE, HARVESTED)).grants
    room.leasing.hear({"carbon": 500.0})
    await _say_slack(room, 2)
    assert room.leasing.lease(ADMIN, grant.lease).state is LeaseState.DRAINING
    with pytest.raises(NoCapacityError):
        await room.leasing.request(ALICE, HARVESTED)
    room.leasing.hear({})
    await room.clock.sleep(room.settings.grace_s + 2.0)
    await _say_slack(room, 4)
    assert len((await room.leasing.request(ALICE, HARVESTED)).grants) == 1
