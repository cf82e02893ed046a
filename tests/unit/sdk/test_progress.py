"""A thread that waits spins only while answers come that soon."""

from typing import Any

import pytest

from isthmus.fabric.channels import Domain, Frame
from isthmus.sdk.progress import Progress
from isthmus.sdk.work import NEVER


class Idle(Progress):
    """Polls nothing; `spins_s` are the spins it was asked for."""

    def __init__(self, spin_s: float) -> None:
        super().__init__(spin_s)
        self.spins_s: list[float] = []

    def step(self, now_s: float, deadline_s: float | None, spin_s: float) -> None:
        self.spins_s.append(spin_s)

    def _is_working(self) -> bool:
        return True

    def _has_idle_executors(self) -> bool:
        return False

    def _has_backlog(self) -> bool:
        return False

    def _next_timer_s(self) -> float:
        return NEVER

    def _before_poll(self) -> None: ...

    def _receive_all(self, domain: Domain, first: Frame) -> None: ...

    def _tick(self) -> None: ...

    def _flush(self) -> None: ...

    def _clean_up(self) -> bool:
        return False


@pytest.mark.parametrize(("spin_s", "later_s"), [(3600.0, 3600.0), (1e-9, 0.0)], ids=["soon", "late"])
def test_a_waiter_spins_again_only_when_the_last_answer_came_within_the_spin(
    spin_s: float, later_s: float
) -> None:
    progress = Idle(spin_s)
    progress.drive_until(lambda: len(progress.spins_s) == 3, None, lambda _: None)
    assert progress.spins_s == [spin_s, later_s, later_s]


def test_the_domain_is_opened_only_after_a_rest_that_lets_the_first_request_leave() -> None:
    progress = Idle(1.0)
    rests: list[Any] = []
    progress.drive_until(lambda: bool(progress.spins_s), None, rests.append)
    assert len(rests) == 1
