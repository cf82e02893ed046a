"""Collectives among real processes, of every small size."""

import os
import pickle
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.core.errors import CallTimeoutError, InvalidRequestError, PeerLostError
from isthmus.core.model import ISTHMUS_VERSION, python_version
from isthmus.fabric.codec import GroupTable
from isthmus.fabric.collectives import Group
from isthmus.fabric.frames import Hello, Welcome
from isthmus.fabric.sockets import SocketDomain

SIZES = [1, 2, 3, 4, 5]


def admit(hello: Hello) -> Welcome:
    return Welcome(
        executor="e",
        python=python_version(),
        isthmus=ISTHMUS_VERSION,
        channel_id=0,
        channel_key=0,
        credits=64,
    )


def member(body: Callable[[Group], Any], table: GroupTable, ready: int, go: int) -> Any:
    domain = SocketDomain()
    domain.listen(table.peers[table.rank][0], admit)
    os.write(ready, b"r")
    os.read(go, 1)
    group = Group(domain, table, timeout_s=10.0)
    try:
        result = body(group)
    except Exception as error:  # what it raised is the result
        result = error
    deadline_s = time.monotonic() + 0.2  # others may still need what this rank has sent
    while time.monotonic() < deadline_s:
        domain.poll(0.05)
    group.close()
    domain.close()
    return result


def run(body: Callable[[Group], Any], size: int, directory: Path) -> list[Any]:
    """body(group) in `size` processes: what each returned or raised; None for one that was killed."""
    peers = tuple((f"unix:{directory}/{rank}", "token") for rank in range(size))
    ready, go = os.pipe(), os.pipe()
    children = []
    for rank in range(size):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                table = GroupTable(group="gr_test", rank=rank, peers=peers)
                os.write(writer, pickle.dumps(member(body, table, ready[1], go[0])))
            finally:
                os._exit(0)
        os.close(writer)
        children.append((child, reader))
    for _ in children:
        os.read(ready[0], 1)
    os.write(go[1], b"g" * size)
    results = []
    for child, reader in children:
        with open(reader, "rb") as file:
            data = file.read()
        os.waitpid(child, 0)
        results.append(pickle.loads(data) if data else None)
    for descriptor in (*ready, *go):
        os.close(descriptor)
    return results


def everything(group: Group) -> dict[str, Any]:
    rank, size = group.rank, group.size
    group.barrier()
    long = np.full(20_003, float(rank + 1))
    return {
        "broadcast": [group.broadcast({"from": rank}, root) for root in range(size)],
        "reduce": group.reduce(rank + 1, "sum", size - 1),
        "allreduce": [group.allreduce(rank + 1, name) for name in ("sum", "prod", "min", "max")],
        "short": group.allreduce(np.arange(4) + rank).tolist(),
        "long": [sorted(set(group.allreduce(long, name).tolist())) for name in ("sum", "max")],
        "function": group.allreduce({rank}, lambda one, other: one | other),
        "gather": group.gather(f"r{rank}", 0),
        "allgather": group.allgather((rank, b"x")),
        "scatter": group.scatter([10 * each for each in range(size)] if rank == 0 else None),
        "all_to_all": group.all_to_all([(rank, each) for each in range(size)]),
        "long unchanged": bool((long == rank + 1).all()),
    }


@pytest.mark.parametrize("size", SIZES)
def test_every_collective_gives_what_its_definition_says(size: int, tmp_path: Path) -> None:
    results = run(everything, size, tmp_path)
    total = size * (size + 1) // 2
    for rank, result in enumerate(results):
        assert not isinstance(result, Exception), result
        assert result["broadcast"] == [{"from": root} for root in range(size)]
        assert result["reduce"] == (total if rank == size - 1 else None)
        assert result["allreduce"] == [total, np.prod(range(1, size + 1)), 1, size]
        assert result["short"] == (np.arange(4) * size + total - size).tolist()
        assert result["long"] == [[float(total)], [float(size)]]
        assert result["function"] == set(range(size))
        assert result["gather"] == ([f"r{each}" for each in range(size)] if rank == 0 else None)
        assert result["allgather"] == [(each, b"x") for each in range(size)]
        assert result["scatter"] == 10 * rank
        assert result["all_to_all"] == [(each, rank) for each in range(size)]
        assert result["long unchanged"]


def test_messages_are_matched_by_source_and_tag_and_kept_in_order(tmp_path: Path) -> None:
    def talk(group: Group) -> Any:
        if group.rank == 0:
            array = np.zeros(50_000)
            for number in range(3):
                group.send(number, 1, tag=7)
                group.send(array, 1, tag=8)
                array += 1
            return None
        arrays = [float(group.recv(0, tag=8)[0]) for _ in range(3)]
        return arrays, [group.recv(0, tag=7) for _ in range(3)]

    assert run(talk, 2, tmp_path)[1] == ([0.0, 1.0, 2.0], [0, 1, 2])


def test_the_death_of_a_rank_is_raised_on_all_that_wait_and_names_it(tmp_path: Path) -> None:
    def die(group: Group) -> Any:
        group.barrier()
        if group.rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(100):
            group.allreduce(1)
        return "finished"

    results = run(die, 4, tmp_path)
    assert results[2] is None
    for rank in (0, 1, 3):
        assert isinstance(results[rank], PeerLostError)
        assert "rank 2 of the group is lost" in str(results[rank])


def test_a_rank_that_says_nothing_costs_the_timeout_only(tmp_path: Path) -> None:
    def wait(group: Group) -> Any:
        group.barrier()
        group.timeout_s = 0.2
        return group.recv(1) if group.rank == 0 else time.sleep(0.5)

    result = run(wait, 2, tmp_path)[0]
    assert isinstance(result, CallTimeoutError)
    assert "rank 1" in str(result)


def test_a_member_that_finishes_first_harms_nobody(tmp_path: Path) -> None:
    def leave(group: Group) -> Any:
        value = group.broadcast("word", 0)
        if group.rank == 1:
            return value
        time.sleep(0.5)
        return group.recv(2) if group.rank == 0 else group.send("late", 0) or "sent"

    assert run(leave, 3, tmp_path) == ["late", "word", "sent"]


def test_nonsense_is_refused(tmp_path: Path) -> None:
    group = Group(SocketDomain(), GroupTable(group="g", rank=0, peers=(("unix:/nowhere", ""),) * 2))
    for act in (
        lambda: group.send(1, 2),
        lambda: group.recv(-1),
        lambda: group.scatter([1]),
        lambda: group.recv(0),
    ):
        with pytest.raises(InvalidRequestError):
            act()
    with pytest.raises(InvalidRequestError, match="median"):
        group.allreduce(1, "median")
    with pytest.raises(PeerLostError, match="rank 1"):
        group.send(1, 1)
    group.close()
    group._domain.close()
