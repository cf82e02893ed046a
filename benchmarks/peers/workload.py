"""The functions that every peer runs, and their arguments."""

import os

import numpy as np

from benchmarks.harness.subject import PAYLOAD_BYTES

ARRAY = np.arange(PAYLOAD_BYTES // 8, dtype=np.float64)


def noop(value: bytes) -> bytes:
    return value


def take(array: np.ndarray) -> None:
    """1 MiB in, nothing out."""


def give() -> np.ndarray:
    """Nothing in, 1 MiB out."""
    return ARRAY


def echo(array: np.ndarray) -> np.ndarray:
    return array


def process_id() -> int:
    return os.getpid()


def check_echo(array: np.ndarray) -> None:
    """Outside the timed part: what came back must be what was sent. Raises RuntimeError."""
    if not np.array_equal(array, ARRAY):
        raise RuntimeError("the echoed array differs from the one that was sent")
