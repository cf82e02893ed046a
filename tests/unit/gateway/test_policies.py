"""What a request would get, asked by an operator on behalf of others."""

from pathlib import Path

from isthmus.core.api import LeaseRequest
from isthmus.core.ids import TenantId
from isthmus.core.model import Quota, Resources
from isthmus.gateway.operations import Asked
from isthmus.gateway.policies import DryRunRequest, Policies
from isthmus.policy import PolicySet
from tests.unit.leasing.rooms import ADMIN, Room, in_a_room

STAFF_ONLY = "[[rule]]\nname = 'staff'\nthen = 'deny'\nwhen = 'tenant.role == \"user\"'\n"
TWO = DryRunRequest(lease=LeaseRequest(resources=Resources(cores=2)), tenant="alice")
QUOTAS = {TenantId("alice"): Quota(cores=1)}


def _quota_of(tenant: TenantId) -> Quota:
    return QUOTAS.get(tenant, Quota())


async def _dry_run(room: Room, body: DryRunRequest) -> tuple[str, str]:
    told = await Policies(room.leasing, _quota_of).dry_run(Asked(ADMIN, {}, None, body))
    return told.decision.outcome, told.decision.blocked_by


@in_a_room()
async def test_a_dry_run_on_anothers_behalf_has_its_quota_and_its_role(room: Room) -> None:
    assert await _dry_run(room, TWO) == ("deny", "quota")
    for tenant, answer in (("bob", ("deny", "rule")), ("", ("grant", ""))):
        assert (
            await _dry_run(room, DryRunRequest(lease=TWO.lease, policy=STAFF_ONLY, tenant=tenant)) == answer
        )


async def _outdated(room: Room) -> bool:
    return (await Policies(room.leasing, _quota_of).show(Asked(ADMIN, {}, None, None))).outdated


@in_a_room(policies=PolicySet(source=__file__, text=Path(__file__).read_text("utf-8")))
async def test_rules_as_their_file_says_them_are_up_to_date(room: Room) -> None:
    assert not await _outdated(room)


@in_a_room(policies=PolicySet(source=__file__, text="# as it was at start"))
async def test_rules_are_outdated_when_their_file_says_something_else_by_now(room: Room) -> None:
    assert await _outdated(room)
