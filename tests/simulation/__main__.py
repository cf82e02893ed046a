"""`python -m tests.simulation --seeds N --seed S`: simulate seeds S .. S+N-1, on all cores; the first failure
stops.
"""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.worlds import World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many worlds (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="the first of them (default 1)")
    parser.add_argument("--trace", action="store_true", help="print what happened in each world")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.seeds)
    if options.trace or options.seeds == 1:
        return max(_report(_simulate_with_trace(seed)) for seed in seeds)
    return _simulate_all(seeds)


def _simulate_all(seeds: range) -> int:
    started = time.monotonic()
    totals: Counter[str] = Counter()
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for done, (seed, failure, counts) in enumerate(pool.map(simulate, seeds, chunksize=4), 1):
            totals.update(counts)
            if failure:
                pool.shutdown(cancel_futures=True)
                return _report((seed, failure, counts))
            if done % 20 == 0 or done == len(seeds):
                print(f"\r{done}/{len(seeds)} worlds, {time.monotonic() - started:.0f} s", end="", flush=True)
    print()
    for what, count in sorted(totals.items()):
        print(f"{count:10d}  {what}")
    return 0


def simulate(seed: int) -> tuple[int, str, dict[str, int]]:
    """The seed, why it failed (empty: it did not), and how often what happened."""
    world = World(seed)
    try:
        world.run()
    except Exception:  # the boundary of a simulated world: whatever went wrong in it is its result
        return seed, traceback.format_exc(), world.counts
    return seed, "", world.counts


def _simulate_with_trace(seed: int) -> tuple[int, str, dict[str, int]]:
    world = World(seed)
    try:
        world.run()
    except Exception:
        return seed, traceback.format_exc(), world.counts
    finally:
        print("\n".join(world.trace))
    return seed, "", world.counts


def _report(result: tuple[int, str, dict[str, int]]) -> int:
    seed, failure, _ = result
    if failure:
        print(f"\n{failure}\nseed {seed} failed; again: make simulate SEED={seed}", file=sys.stderr)
        print(f"(or: python -m tests.simulation --seed {seed} --trace)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
