"""What runs in Slurm's jobs. Apart from the tests, so that executors need not import pytest."""

import os
import time

import isthmus


def square(number: int) -> int:
    return number * number


def where() -> dict[str, str]:
    return {"job": os.environ["SLURM_JOB_ID"], "node": os.environ["SLURMD_NODENAME"]}


def slow_square(number: int, path: str, duration_s: float) -> int:
    """Leaves a mark when it begins: the job that it runs in."""
    with open(path, "a") as file:
        file.write(os.environ["SLURM_JOB_ID"] + "\n")
    time.sleep(duration_s)
    return number * number


def slow_steps(number: int, path: str, duration_s: float) -> int:
    """Like slow_square, but takes its time in steps: while it is stopped none passes."""
    slow_square(number, path, 0.0)
    for _ in range(round(duration_s / 0.1)):
        time.sleep(0.1)
    return number * number


def slow_at_first(number: int, path: str) -> int:
    """Takes a minute where it runs first, and no time wherever it runs again."""
    is_first = not os.path.exists(path)
    return slow_square(number, path, 60.0 if is_first else 0.0)


@isthmus.function(resources=isthmus.Resources(cores=64))
def too_wide() -> None:
    """Asks for more than any node has."""


@isthmus.function(lease_class=isthmus.LeaseClass.RESERVED)
def where_reserved() -> dict[str, str]:
    return where()


@isthmus.function(
    lease_class=isthmus.LeaseClass.HARVESTED, resources=isthmus.Resources(cores=1, memory="256MiB")
)
def where_harvested() -> dict[str, str]:
    return {**where(), "class": "idle" if os.sched_getscheduler(0) == os.SCHED_IDLE else "other"}


@isthmus.function(
    lease_class=isthmus.LeaseClass.HARVESTED, resources=isthmus.Resources(cores=1, memory="256MiB")
)
def slow_at_first_harvested(number: int, path: str) -> int:
    return slow_at_first(number, path)
