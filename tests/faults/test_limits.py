"""Payloads from nothing to two gigabytes, a full /dev/shm, a full disk, two hundred clients at once."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import isthmus
from tests.faults import doors

SOON_S = 10.0
HUGE_BYTES = 2 * 2**30
CLIENTS = 200
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 0x4000, 1 << 18


def add(left: int, right: int) -> int:
    return left + right


def same(value: object) -> object:
    return value


def checksum(array: np.ndarray) -> tuple[int, int]:
    return array.nbytes, int(array[:: 2**20].sum())


def grow(size_bytes: int) -> np.ndarray:
    return np.full(size_bytes, 7, np.uint8)


NOTHING = (
    b"", "", None, (), [], {}, bytearray(), memoryview(b""), np.empty(0), np.empty((0, 3)),
    [np.empty(0), b"", np.empty(0)], np.float64(0), b"\0",
)  # fmt: skip


def test_nothing_travels_like_anything(site: isthmus.Site) -> None:
    for value in NOTHING:
        back = site.call(same, value)
        if isinstance(value, np.ndarray):
            assert isinstance(back, np.ndarray)
            assert (back.shape, back.dtype) == (value.shape, value.dtype)
        elif isinstance(value, list) and value:
            assert isinstance(back, list)
            assert len(back) == len(value)
        else:
            assert back == value


def test_payloads_around_every_threshold_stay_whole(site: isthmus.Site) -> None:
    for size_bytes in [2**power + more for power in (8, 12, 13, 16, 20, 24) for more in (-1, 0, 1)]:
        value = np.random.default_rng(size_bytes).bytes(size_bytes)
        assert site.call(same, value) == value, size_bytes


def free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no MemAvailable in /proc/meminfo")


def test_two_gigabytes_there_and_back(site: isthmus.Site) -> None:
    if free_bytes() < 6 * HUGE_BYTES:
        pytest.skip(f"needs {6 * HUGE_BYTES} bytes of free memory")
    big = isthmus.Resources(memory="5GiB")
    array = np.full(HUGE_BYTES + 1, 3, np.uint8)
    there = site.submit(isthmus.function(big)(checksum), array).result(timeout_s=6 * SOON_S)
    assert there == (HUGE_BYTES + 1, 3 * (HUGE_BYTES // 2**20 + 1))
    del array
    back = site.submit(isthmus.function(big)(grow), HUGE_BYTES + 1).result(timeout_s=6 * SOON_S)
    assert (back.nbytes, int(back[-1])) == (HUGE_BYTES + 1, 7)


SMALL_SHM = """
import os, sys
import numpy as np
import isthmus

def same(value):
    return value

def fill():
    with open("/dev/shm/filler", "wb") as file:
        try:
            while True:
                file.write(bytes(2**20))
                file.flush()
        except OSError:
            pass

if __name__ == "__main__":
    with isthmus.connect() as site:
        if sys.argv[1] == "later":
            assert site.call(same, 1) == 1
        fill()
        for size_bytes in (0, 100, 10_000, 2**20, 64 * 2**20):
            try:
                value = np.ones(size_bytes, np.uint8)
                assert (site.submit(same, value).result(timeout_s=20) == value).all()
                print(size_bytes, "whole")
            except (isthmus.IsthmusError, MemoryError, OSError) as error:
                print(size_bytes, type(error).__name__, error)
        os.unlink("/dev/shm/filler")
        assert site.submit(same, 2).result(timeout_s=20) == 2
    print("served")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a /dev/shm of its own needs root")
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_full_shared_memory_breaks_no_promise(environment: None, tmp_path: Path, when: str) -> None:
    """No bus error and no hang: large payloads travel another way, or fail with a typed error."""
    program = tmp_path / "program.py"
    program.write_text(SMALL_SHM)
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm && exec"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mount} "$@"', "sh", sys.executable, str(program), when],
        capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "served", done.stdout


def test_many_threads_share_one_client(site: isthmus.Site) -> None:
    with ThreadPoolExecutor(64) as threads:
        results = list(threads.map(lambda number: site.call(add, number, 1), range(2000)))
    assert results == list(range(1, 2001))


def test_ten_thousand_calls_in_flight_all_end(site: isthmus.Site) -> None:
    futures = [site.submit(add, number, 1) for number in range(10_000)]
    assert [future.result(timeout_s=3 * SOON_S) for future in futures] == list(range(1, 10_001))


def test_a_client_out_of_descriptors_says_so_and_recovers(site: isthmus.Site) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        assert site.call(add, 1, 2) == 3  # an open channel needs no new descriptor
        with pytest.raises((isthmus.IsthmusError, OSError)):
            isthmus.connect(doors.find().url).call(add, 1, 2)
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert site.submit(add, 1, 2).result(timeout_s=SOON_S) == 3


@pytest.mark.timeout(300)
def test_two_hundred_clients_at_once_each_get_their_answer(site: isthmus.Site) -> None:
    """Two hundred open sites in one process, each with a lease of its own when its turn comes."""
    door = doors.find()
    together = threading.Barrier(CLIENTS)

    def one(number: int) -> int:
        together.wait(timeout=60)
        with isthmus.connect(door.url, api_key=door.key) as client:
            return client.submit(add, number, 1).result(timeout_s=200)

    with ThreadPoolExecutor(CLIENTS) as threads:
        results = list(threads.map(one, range(CLIENTS)))
    assert results == [number + 1 for number in range(CLIENTS)]
