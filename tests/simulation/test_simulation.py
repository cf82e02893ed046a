"""The control plane in made-up worlds. Many more seeds: `make simulate SEED=n`."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulation.__main__ import simulate
from tests.simulation.agents import OverCommitError
from tests.simulation.worlds import World

SEEDS_PER_TEST = 5


@pytest.mark.parametrize("first_seed", range(1, 41, SEEDS_PER_TEST))
def test_no_world_breaks_a_promise(first_seed: int) -> None:
    totals: Counter[str] = Counter()
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        _, failure, counts = simulate(seed)
        assert not failure, f"seed {seed} failed; again: make simulate SEED={seed}\n{failure}"
        totals.update(counts)
    assert totals["site crashes"]
    assert totals["ended released"], "worlds in which nothing ever works prove nothing"


def test_a_seed_tells_the_whole_story_again_in_another_process() -> None:
    program = (
        "import hashlib; from tests.simulation.worlds import World; world = World(7); world.run(); "
        "print(hashlib.sha256('\\n'.join(world.trace).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    again = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    world = World(7)
    world.run()
    assert hashlib.sha256("\n".join(world.trace).encode()).hexdigest() == again.stdout.strip()


def test_the_simulation_notices_an_over_committed_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that does not fence silent nodes must be caught, or the other tests are worth nothing."""
    from isthmus.leasing.acting import Acting

    monkeypatch.setattr(Acting, "extend_fence", lambda self, held: setattr(held, "fenced_at", 0.0))
    with pytest.raises(OverCommitError):
        _run_worlds(range(1, 20))


def _run_worlds(seeds: range) -> None:
    for seed in seeds:
        World(seed).run()
