"""Members of a group on real executors."""

import os
from typing import Any

import numpy as np
import pytest

from isthmus.core.errors import (
    CallCancelledError,
    PeerLostError,
)
from isthmus.fabric.codec import FunctionHeader, GroupTable, encode_group, encode_header
from isthmus.fabric.frames import Kind
from isthmus.node.messages import (
    AddExecutor,
)
from tests.live.node.conftest import address_of, await_running
from tests.live.node_peer import (
    Client,
    Site,
    token,
)


def _join(clients: list[Client], addresses: list[str], lease: str, function: Any) -> list[int]:
    """Start a call of a group's function on each member; their ids."""
    peers = tuple((address, token(lease)) for address in addresses)
    calls = []
    for rank, client in enumerate(clients):
        table = GroupTable(group=f"gr_{lease}", rank=rank, peers=peers)
        client.call(client.define(os.getpid))  # the way is paved: what follows leaves at once, without a poll
        header = encode_header(FunctionHeader(name="group", kind="group"))
        client.send(Kind.DEFINE, 0, 500, header, [encode_group(table)])
        calls.append(client.start(client.define(function, group=500)))
    return calls


def test_members_of_a_group_reach_each_other(site: Site, lease: str) -> None:
    more = site.done(AddExecutor, lease=lease).executor
    assert more is not None
    addresses = [address_of[lease], more.address]

    def share(group: Any) -> tuple[int, float]:
        total = group.allreduce(np.full(100_000, float(group.rank + 1)))
        group.barrier()
        return group.rank, float(total.sum())

    with Client(addresses[0], lease) as first, Client(addresses[1], lease) as second:
        calls = _join([first, second], addresses, lease, share)
        assert first.result(calls[0]) == (0, 300_000.0)
        assert second.result(calls[1]) == (1, 300_000.0)


def test_a_member_whose_partner_cannot_be_reached_fails(lease: str) -> None:
    address = address_of[lease]
    with Client(address, lease) as client:
        (call,) = _join([client], [address, "unix:/nobody"], lease, lambda group: group.recv(1))
        with pytest.raises(PeerLostError):
            client.result(call)


def test_a_member_waiting_for_one_that_never_comes_is_cancelled(site: Site, lease: str) -> None:
    more = site.done(AddExecutor, lease=lease).executor
    assert more is not None
    addresses = [address_of[lease], more.address]
    with Client(addresses[0], lease) as client:
        (call,) = _join([client], addresses, lease, lambda group: group.recv(1))
        await_running(client)
        client.cancel(call)
        with pytest.raises(CallCancelledError):
            client.result(call, timeout_s=5)
