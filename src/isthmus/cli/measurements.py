"""Command: bench."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from isthmus.cli.failures import Failure
from isthmus.cli.options import Json, State
from isthmus.cli.output import show

COLD_SAMPLES = 4
WARM_SAMPLES = 30
LARGE_SAMPLES = 200
WARM_PAUSE_S = 0.05  # longer than an executor spins, so that it has gone to sleep


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    calls: Annotated[int, typer.Option(min=10, max=1_000_000, help="Hot calls to time.")] = 5000,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Time a no-op call on the current site.

    Cold, warm and hot, and 1 MiB there and back.

    \b
      isthmus bench
    A quick look at this machine now. The measured claims live in the repository's benchmarks.
    """
    try:
        import isthmus
    except ImportError as error:
        raise Failure(f"the client part of isthmus does not load: {error}") from error
    if not hasattr(isthmus, "connect"):
        raise Failure("the client part of isthmus is not in this installation")
    rows = _measure(isthmus, calls, state)
    show(
        rows,
        as_json,
        [
            ("CALL", lambda row: row["name"]),
            ("SAMPLES", lambda row: row["samples"]),
            ("MEDIAN µs", lambda row: f"{row['median_us']:.1f}"),
            ("P99 µs", lambda row: f"{row['p99_us']:.1f}"),
        ],
        "",
    )


def _measure(isthmus: Any, calls: int, state: Path | None) -> list[dict[str, Any]]:
    """Times of calls through the client, as its users make them."""
    from isthmus.cli.sites import open_site

    found = open_site(state)
    payload = b"x" * 2**20

    def first_call() -> float:
        """A client of its own, so a lease of its own; connecting to the site is not counted."""
        with isthmus.connect(found.url, api_key=found.key) as site:
            return _time(lambda: site.call(_echo, b"x"), 1)[0]

    first_call()  # starts the zygote, which then stays
    cold = [first_call() for _ in range(COLD_SAMPLES)]
    with isthmus.connect(found.url, api_key=found.key) as site:
        first, *hot = _time(lambda: site.call(_echo, b"x"), calls + 1)
        warm = _time(lambda: site.call(_echo, b"x"), WARM_SAMPLES, pause_s=WARM_PAUSE_S)
        large = _time(lambda: site.call(_echo, payload), min(calls, LARGE_SAMPLES))
    return [
        _row("cold: lease, fork, connect, call", [*cold, first]),
        _row("warm: the executor sleeps", warm),
        _row("hot: the executor spins", hot),
        _row("hot: 1 MiB there and back", large),
    ]


def _echo(value: bytes) -> bytes:
    return value


def _time(call: Callable[[], object], samples: int, pause_s: float = 0.0) -> list[float]:
    """Seconds of each call."""
    durations = []
    for _ in range(samples):
        if pause_s:
            time.sleep(pause_s)
        started_s = time.perf_counter()
        call()
        durations.append(time.perf_counter() - started_s)
    return durations


def _row(name: str, durations: list[float]) -> dict[str, Any]:
    ordered = sorted(durations)
    return {
        "name": name,
        "samples": len(ordered),
        "median_us": statistics.median(ordered) * 1e6,
        "p99_us": ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)] * 1e6,
    }
