"""What the kernel says of waits for memory, and what is said where it says nothing."""

from pathlib import Path

import pytest

from isthmus.node.pressure import Stalls, stalled_us

S = 10**9


def says(file: Path, total_us: int) -> None:
    file.write_text(
        f"some avg10=0.00 avg60=0.00 avg300=0.00 total={total_us}\n"
        "full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"
    )


@pytest.fixture
def node(tmp_path: Path) -> Path:
    says(tmp_path / "memory", 0)
    return tmp_path / "memory"


def test_a_share_is_of_the_time_since_the_look_before(node: Path) -> None:
    stalls = Stalls(None, node)
    assert stalls.share(5 * S) == 0.0
    says(node, 500_000)
    assert stalls.share(7 * S) == 0.25
    assert stalls.share(9 * S) == 0.0


def test_the_job_s_own_group_goes_before_the_node(tmp_path: Path, node: Path) -> None:
    group = tmp_path / "job_42"
    group.mkdir()
    assert Stalls(group, node).source == str(node)
    says(group / "memory.pressure", 0)
    assert Stalls(group, node).source == str(group / "memory.pressure")


def test_a_kernel_that_does_not_say_is_no_pressure_and_is_told_as_such(tmp_path: Path) -> None:
    stalls = Stalls(tmp_path, tmp_path / "absent")
    assert (stalls.source, stalls.share(S), stalls.share(2 * S)) == ("none", 0.0, 0.0)


def test_a_group_that_has_gone_is_no_pressure(node: Path) -> None:
    stalls = Stalls(None, node)
    stalls.share(S)
    node.unlink()
    assert stalls.share(2 * S) == 0.0


@pytest.mark.parametrize("text", ["", "some\n", "full avg10=0.00 total=3\n", "some avg10=0.00\n"])
def test_what_says_no_total_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "memory").write_text(text)
    assert stalled_us(tmp_path / "memory") is None
