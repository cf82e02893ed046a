"""Twenty seconds of the soak (`make soak MINUTES=30` is the long one)."""

import json

import pytest

from tests.faults.soak import soak


@pytest.mark.timeout(300)
def test_random_kills_under_load_lose_nothing() -> None:
    report = soak(duration_s=20.0, seed=7, clients=2)
    assert report["ok"], json.dumps(report, indent=2)
    assert report["counts"]["right value"] > 0
    assert sum(report["kills"].values()) > 5
