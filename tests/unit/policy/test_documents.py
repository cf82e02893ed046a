"""Every policy file that the documents show loads as it stands, and does what is said beside it."""

import re
from pathlib import Path

import msgspec
import pytest

from isthmus.core.api import LeaseRequest
from isthmus.core.model import Resources
from isthmus.policy import Demand, PolicySet, decide, load_policies
from tests.unit.policy.situations import demand, node, snapshot

PAGE = Path(__file__).parents[3] / "docs" / "policy.md"
BLOCKS = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
TUESDAY_NOON_S = 5 * 86400 + 12 * 3600.0


@pytest.mark.parametrize("text", BLOCKS, ids=range(len(BLOCKS)))
def test_a_policy_file_of_the_page_loads(text: str) -> None:
    policies = load_policies(text)
    assert policies.rules or policies.terms


def _of(words: str) -> PolicySet:
    (text,) = (text for text in BLOCKS if words in text)
    return load_policies(text)


def _large(tenant: str) -> Demand:
    small = demand(tenant=tenant)
    lease = LeaseRequest(resources=Resources(cores=16))
    return Demand(request=small.request, tenant=small.tenant, lease=lease)


def test_guests_wait_for_the_night() -> None:
    policies = _of("guests by day")
    site = node("a", free=32, cores=32)
    assert decide(policies, snapshot(site, clock_s=TUESDAY_NOON_S), _large("guest")).outcome == "deny"
    night = TUESDAY_NOON_S + 8 * 3600
    assert decide(policies, snapshot(site, clock_s=night), _large("guest")).outcome == "grant"
    assert decide(policies, snapshot(site, clock_s=TUESDAY_NOON_S), _large("alice")).outcome == "grant"


def test_data_stays_where_it_may_be() -> None:
    policies = _of("residency")
    site = snapshot(node("full", free=1), node("abroad", free=2, country="fr"), node("home", country="de"))
    decision = decide(policies, site, demand(residency="de"))
    assert decision.places == ("home",)
    assert decide(policies, site, demand()).places == ("full",)


def test_large_requests_wait_for_greener_hours() -> None:
    policies = _of("green hours")
    site = snapshot(node("a", free=64, cores=64))
    small = demand()
    lease = LeaseRequest(resources=Resources(cores=32))
    large = Demand(request=small.request, tenant=small.tenant, lease=lease)
    dirty = msgspec.structs.replace(site, signals={"carbon": 500.0})
    assert decide(policies, dirty, large).outcome == "deny"
    assert decide(policies, dirty, small).outcome == "grant"
    assert decide(policies, site, large).outcome == "grant"
