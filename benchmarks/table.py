"""Render the README's table of numbers from a results file: `python -m benchmarks.table RESULT.json`.

Invariant: a number comes from the file or is not there; the caption names machine, commit and load.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.report import number

_ROWS = (
    ("raw UCX round trip (floor)", "floors", "ucx_round_trip_us", "", "", ""),
    ("Unix socket, blocking (floor)", "floors", "socket_round_trip_us", "", "", ""),
    ("**isthmus** `site.call`, hot", "hot", "call_us", "payload.in_us", "payload.out_us", ""),
    ("**isthmus** leased memory, a block put and got", "", "", "memory.put_us", "memory.get_us", ""),
    ("**isthmus** `site.submit`, many at once", "", "", "", "", "pipelined.submit_throughput_per_s"),
    ("**isthmus** pipelined, one frame a call, bare channel", "", "", "", "",
     "pipelined.raw_throughput_per_s"),
    ("**isthmus** `site.map`, many calls to a frame", "", "", "", "", "pipelined.map_throughput_per_s"),
    ("**isthmus** native function, hot, bare channel", "native", "channel_us", "", "", ""),
    ("**isthmus** `site.call` of a native function, hot", "native", "call_us", "", "", ""),
    ("**isthmus** `site.call`, warm", "warm", "call_us", "", "", ""),
)  # fmt: skip
_PEERS = (
    ("`multiprocessing.Pipe`", "pipe", "call"),
    ("ZeroMQ REQ/REP (per s: DEALER), pickle 5", "zmq", "req"),
    ("gRPC unary, pickle 5", "grpc", "unary"),
    ("`ProcessPoolExecutor`", "pool", "submit"),
    ("Ray actor", "ray", "actor"),
    ("Ray task", "ray", "task"),
    ("Parsl HTEX", "parsl", "htex"),
    ("Dask submit", "dask", "submit"),
    ("Dask actor", "dask", "actor"),
)
_HEADINGS = ("", "no-op call, 1 B: p50 / p99 µs", "× isthmus", "1 MiB in µs", "1 MiB out µs", "no-ops per s")


def render(document: dict[str, Any]) -> str:
    """Markdown: one row per system that was measured, then the promises, then the caption."""
    cells = document["cells"]
    rows = (_row(cells, row) for row in [*_ROWS, *_peer_rows()])
    lines = markdown([_HEADINGS, *filter(None, rows)])
    promises = [("promise", "bound", "measured", "")]
    for row in document["promises"]:
        if row["value"] is not None:
            measured = f"{number(row['value'])} {row['unit']}"
            promises.append((row["text"], row["bound"], measured, row["shortfall"] or row["outcome"]))
    return "\n".join([*lines, "", *markdown(promises), "", _caption(document)])


def _peer_rows() -> list[tuple[str, ...]]:
    return [
        (title, subject, f"{way}_noop_us", f"{subject}.{way}_in_us", f"{subject}.{way}_out_us",
         f"{subject}.{way if subject != 'zmq' else 'dealer'}_throughput_per_s")
        for title, subject, way in _PEERS
    ]  # fmt: skip


def _row(cells: dict[str, Any], row: tuple[str, ...]) -> tuple[str, ...] | None:
    title, subject, latency, *others = row
    summary = cells.get(f"{subject}.{latency}")
    medians = [number(cells[name]["p50"]) if name in cells else "" for name in others]
    if summary is None:
        return (title, "", "", *medians) if not subject and any(medians) else None
    hot = cells.get("hot.call_us")
    ratio = number(summary["p50"] / hot["p50"]) if hot else ""
    return title, f"{number(summary['p50'])} / {number(summary['p99'])}", ratio, *medians


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _caption(document: dict[str, Any]) -> str:
    load = document["load_average"]
    packages = dict.fromkeys(
        f"{package} {version}"
        for answered in document["versions"].values()
        for package, version in answered.items()
        if package != "python"
    )
    versions = ", ".join(packages)
    return (
        f"{document['machine']['line']}; {document['started'][:10]}, commit {document['machine']['commit']}; "
        f"{document['rounds']} interleaved rounds, caller and worker pinned to two cores; load "
        f"{load['start']:.2f} to {load['end']:.2f}{'' if document['quiet'] else ' (not quiet)'}; {versions}."
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.table RESULT.json")
    print(render(json.loads(Path(sys.argv[1]).read_text("utf-8"))))


if __name__ == "__main__":
    main()
