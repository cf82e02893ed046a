"""Executors make their shared memory where their agent can clear it away."""

from pathlib import Path

from isthmus.node.shared_memory import SharedMemory


def test_what_the_killed_left_is_cleared_by_the_next_agent(tmp_path: Path) -> None:
    place = Path(SharedMemory("tag", tmp_path).variables["UCX_POSIX_DIR"])
    (place / "ucx_shm_posix_1").touch()
    shared = SharedMemory("tag", tmp_path)
    assert list(place.iterdir()) == []
    (place / "ucx_shm_posix_2").touch()
    shared.remove()
    assert not place.exists()


def test_a_directory_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    place = Path(SharedMemory("tag", tmp_path).variables["UCX_POSIX_DIR"])
    place.chmod(0o777)
    (place / "mine").touch()
    shared = SharedMemory("tag", tmp_path)
    shared.remove()
    assert (shared.variables, (place / "mine").exists()) == ({}, True)


def test_without_a_place_for_it_ucx_keeps_its_own(tmp_path: Path) -> None:
    assert SharedMemory("tag", tmp_path / "missing").variables == {}
