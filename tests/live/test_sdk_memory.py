"""Leased memory through a real site: what was put is what one gets, within what was leased."""

import gc
import pickle
import random
from collections.abc import Iterator

import numpy as np
import pytest

import isthmus
from isthmus.sdk.memory import PIECE_BYTES
from tests.live.sites import RunningSite, running_site

MIB = 1 << 20


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSite]:
    state = tmp_path_factory.mktemp("memory") / "state"
    with running_site(state, ISTHMUS_NODE__CORES="1") as site:
        yield site


@pytest.fixture
def site(running: RunningSite) -> Iterator[isthmus.Site]:
    with isthmus.connect(running.url, api_key=running.key) as opened:
        yield opened


@pytest.fixture
def memory(site: isthmus.Site) -> Iterator[isthmus.Memory]:
    with site.memory("64MiB") as opened:
        yield opened


def test_a_block_gives_back_what_was_put_into_it(memory):
    size_bytes = 3 * PIECE_BYTES + 5
    block, model, chance = memory.allocate(size_bytes), bytearray(size_bytes), random.Random(7)
    assert bytes(block.get()) == model
    for _ in range(40):
        begin = chance.randrange(size_bytes)
        end = min(begin + chance.choice([0, 1, 4096, MIB, size_bytes]), size_bytes)
        data = chance.randbytes(end - begin)
        block.put(data, begin)
        model[begin:end] = data
        begin = chance.randrange(size_bytes)
        assert block.get(begin) == model[begin:]
        assert block.get(begin, 1) == model[begin : begin + 1]


def test_arrays_of_any_shape_are_put_as_their_bytes(memory):
    array = np.arange(12.0).reshape(3, 4)
    block = memory.allocate(array.nbytes)
    block.put(array)
    assert np.array_equal(np.frombuffer(block.get()).reshape(3, 4), array)
    block.put(np.asfortranarray(array))
    assert np.array_equal(np.frombuffer(block.get()).reshape(4, 3).T, array)
    block.put(np.empty((0, 3)))
    assert np.array_equal(np.frombuffer(block.get()).reshape(4, 3).T, array), "nothing was put"
    with pytest.raises(BufferError, match="contiguous"):
        block.put(array[:, ::2])


def test_all_that_was_leased_can_be_used_at_once(memory):
    """The holder is killed if it takes more than the lease has."""
    blocks = [memory.allocate("16MiB") for _ in range(4)]
    assert memory.free_bytes == 0
    for _ in range(3):
        for number, block in enumerate(blocks):
            block.put(bytes([number + 1]) * (16 * MIB))
    assert [block.get()[-1] for block in blocks] == [1, 2, 3, 4]
    with pytest.raises(isthmus.NoCapacityError, match=r"0 B of 64.0 MiB are free; free other blocks"):
        memory.allocate(1)


def test_freed_and_dropped_blocks_make_room(memory):
    for _ in range(4):
        block = memory.allocate("64MiB")
        block.put(b"x", 64 * MIB - 1)
        block.free()
        block.free()
    for _ in range(4):
        block = memory.allocate("64MiB")
        block.put(b"x")
        del block
        gc.collect()
    assert memory.free_bytes == 64 * MIB


@pytest.mark.parametrize(("offset", "size_bytes"), [(-1, 1), (0, 11), (10, 1), (11, 0), (5, -1)])
def test_nothing_outside_a_block_is_touched(memory, offset, size_bytes):
    block = memory.allocate(10)
    with pytest.raises(ValueError, match="outside a block of 10 bytes"):
        block.get(offset, size_bytes)
    with pytest.raises(ValueError, match="outside a block of 10 bytes"):
        block.put(bytes(11), offset)
    assert bytes(block.get()) == bytes(10)


def test_a_block_is_its_clients_own(memory):
    with pytest.raises(TypeError, match="belongs to the client that allocated it"):
        pickle.dumps(memory.allocate(1))


def test_a_freed_block_and_a_closed_memory_say_so(site):
    with site.memory("1MiB") as memory:
        freed, kept = memory.allocate(1), memory.allocate(1)
        freed.free()
        with pytest.raises(LookupError, match="freed"):
            freed.get()
    with pytest.raises(isthmus.LeaseEndedError, match="this memory was closed"):
        kept.put(b"x")
    with pytest.raises(isthmus.LeaseEndedError, match="closed"):
        memory.allocate(1)
    kept.free()


@pytest.mark.parametrize("size", [0, "0B", "-1MiB", "much"])
def test_a_size_that_is_none_is_refused(site, memory, size):
    with pytest.raises(ValueError, match=r"\w"):
        memory.allocate(size)
    with pytest.raises(ValueError, match=r"\w"):
        site.memory(size)


def test_what_a_revoked_lease_held_is_lost_and_its_user_is_told(site, running):
    memory = site.memory("1MiB")
    block = memory.allocate(10)
    block.put(b"0123456789")
    (lease,) = site.leases()
    with running.client() as admin:
        assert admin.delete(f"/v1/leases/{lease.lease}").status_code < 300
    for attempt in (block.get, lambda: block.put(b"x"), lambda: memory.allocate(1)):
        with pytest.raises((isthmus.EvictedError, isthmus.ExecutorLostError)):
            attempt()
    block.free()
    memory.close()
