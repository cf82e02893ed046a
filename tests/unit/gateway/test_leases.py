"""The log of a lease whose node does not answer as it did."""

import asyncio

import pytest

from isthmus.core.errors import NotFoundError, SiteUnavailableError
from isthmus.core.ids import LeaseId, NodeId, TenantId
from isthmus.core.model import Environment, Lease, LeaseClass, LeaseState, Principal, Resources
from isthmus.gateway.leases import Leases, LogQuery
from isthmus.gateway.operations import Asked

LEASE = LeaseId("ls_a")
TENANT = TenantId("t")
ASKED = Asked(Principal(tenant=TENANT), {"lease": LEASE}, LogQuery(offset=7), None)


class Past:
    """Leasing that knows one lease."""

    def __init__(self, state):
        self._lease = Lease(
            lease=LEASE, tenant=TENANT, resources=Resources(), lease_class=next(iter(LeaseClass)),
            environment=Environment(), state=state, node=NodeId("n"),
        )  # fmt: skip

    def lease(self, principal, lease_id):
        return self._lease


class Refusing:
    """A node that answers every order with this error."""

    def __init__(self, error):
        self._error = error

    async def order(self, node, order):
        raise self._error


def read(state, error):
    return asyncio.run(Leases(Past(state), Refusing(error)).log(ASKED))


def test_what_stayed_on_a_node_that_is_away_is_told_with_a_typed_error():
    with pytest.raises(SiteUnavailableError, match="output of ls_a stayed on its node: node n has no"):
        read(LeaseState.ENDED, SiteUnavailableError("node n has no agent"))


def test_a_running_lease_on_a_node_that_is_away_gets_the_nodes_own_words():
    with pytest.raises(SiteUnavailableError, match=r"^node n has no agent$"):
        read(LeaseState.ACTIVE, SiteUnavailableError("node n has no agent"))


def test_output_that_the_node_keeps_no_more_is_empty_and_over():
    chunk = read(LeaseState.ENDED, NotFoundError("no lease ls_a"))
    assert (chunk.text, chunk.next_offset, chunk.ended) == ("", 7, True)
