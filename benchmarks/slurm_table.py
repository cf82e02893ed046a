"""Render the README's second table: `python -m benchmarks.slurm_table RESULT.json [README.md]`.

With README.md it replaces what stands there between the table's marks. Invariant: a number comes from the
file or is not there; the caption names machine, commit and load.
"""

import json
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.promises import Verdict, judge_value, load
from benchmarks.harness.report import number
from benchmarks.table import markdown

BEGIN = "<!-- slurm-table:begin (python -m benchmarks.slurm_table) -->\n"
END = "<!-- slurm-table:end -->"
_HARVEST = (
    "batch job", "slower beside busy processes, %", "slower beside isthmus, %", "idle core-seconds used, %",
    "of those nobody else used, %", "cores back, ms: p50 / p99",
    "threads at full speed, ms, p50: alone / busy processes / isthmus",
)  # fmt: skip
_PEER_HEADINGS = ("from asking for one core to the first result", "p50 ms", "worst ms", "× bare", "samples")
_WAYS = {
    "bare": "bare `salloc` + `srun`, runs `true`",
    "pool": "**isthmus**, an allocation that stands ready",
    "isthmus": "**isthmus**, a new allocation",
    "hyperqueue": "HyperQueue, started by `salloc` + `srun`",
    "dask": "Dask-jobqueue",
    "parsl": "Parsl HTEX, SlurmProvider",
}
"""Of `slurm_peers`, in the table's order."""
_PROMISES = {promise.id: promise for promise in load()}


def render(document: dict[str, Any]) -> str:
    """Markdown: what each part measured, then the promises, then the caption."""
    parts = {name: part["summary"] for name, part in document["parts"].items()}
    failures = document["parts"].get("peers", {}).get("failures", {})
    lines: list[str] = []
    if "harvest" in parts:
        lines += [*markdown([_HARVEST, *map(_harvest_row, parts["harvest"])]), ""]
    if "peers" in parts:
        lines += [*markdown([_PEER_HEADINGS, *_peer_rows(parts["peers"], failures)]), ""]
    if "preempted" in parts:
        lines += [_preempted(parts["preempted"]), ""]
    if "load" in parts:
        lines += [_load(parts["load"]), ""]
    if "main_job" in parts:
        lines += [_main_job(parts["main_job"]), ""]
    promises = [_promise_row(verdict) for verdict in verdicts(parts)]
    lines += [*markdown([("promise", "bound", "measured", ""), *promises]), ""] if promises else []
    return "\n".join([*lines, _caption(document)])


def verdicts(parts: dict[str, Any]) -> Iterator[Verdict]:
    if "harvest" in parts:
        rows = parts["harvest"]
        yield _verdict("harvest-share", recovered_percent(rows))
        yield _verdict("harvest-slowdown", max(row["harvested_slowdown_percent"] for row in rows))
        reclaims = [row["reclaim_ms"]["p99"] for row in rows if row["reclaim_ms"]]
        if reclaims:
            yield _verdict("harvest-reclaim", max(reclaims))
    peers = parts.get("peers", {})
    for name, promise in (("isthmus", "slurm-lease"), ("pool", "slurm-lease-ready")):
        if {"bare", name} <= peers.keys():
            yield _verdict(promise, peers[name]["p50"] - peers["bare"]["p50"])
    if "preempted" in parts:
        yield _verdict("slurm-lost", parts["preempted"]["lost"])


def _verdict(promise: str, value: float) -> Verdict:
    return judge_value(_PROMISES[promise], value)


def recovered_percent(rows: list[dict[str, Any]]) -> float:
    """Of all jobs' idle core-seconds together."""
    idle_s = sum(row["idle_core_s"] for row in rows)
    return 100 * sum(row["got_core_s"] for row in rows) / idle_s if idle_s else 0.0


def _promise_row(verdict: Verdict) -> tuple[str, ...]:
    promise, value = verdict.promise, verdict.value or 0.0
    measured = f"{number(value)} {promise.unit}".strip()
    by_how_much = verdict.shortfall if promise.at_most != 0 else ""  # no factor of nothing
    return promise.text, promise.bound.strip(), measured, by_how_much or verdict.outcome


def _harvest_row(row: dict[str, Any]) -> tuple[str, ...]:
    speeds = [row[f"{mode}_full_speed_ms"] for mode in ("alone", "naive", "harvested")]
    return (
        row["work"], _figure(row["naive_slowdown_percent"]), _figure(row["harvested_slowdown_percent"]),
        _figure(row["recovered_percent"]), _figure(row["recovered_of_unused_percent"]),
        _pair(row["reclaim_ms"]), " / ".join(f"{one['p50']:.1f}" for one in speeds if one),
    )  # fmt: skip


def _peer_rows(peers: dict[str, Any], failures: Container[str]) -> Iterator[tuple[str, ...]]:
    bare = peers.get("bare")
    for name, title in _WAYS.items():
        if name in failures:
            title += " (failed)" if name not in peers else " (failed at times)"
            if name not in peers:
                yield title, "", "", "", "0"
        if name in peers:
            one = peers[name]
            ratio = f"{one['p50'] / bare['p50']:.1f}" if bare else ""
            yield title, f"{one['p50']:.0f}", f"{one['worst']:.0f}", ratio, str(one["count"])


def _preempted(one: dict[str, Any]) -> str:
    return (
        f"{one['in_flight']:,} calls in flight while a batch job took all nodes: {one['lost']} lost, "
        f"{one['charged']} charged; {one['ran_again']} had begun and ran again. The job waited "
        f"{one['batch_waited_s']:.1f} s for its nodes, {one['batch_waited_bare_s']:.1f} s where ordinary "
        "jobs held them."
    )


def _load(rows: list[dict[str, Any]]) -> str:
    idle, busy = rows[0], rows[-1]
    return (
        f"Requests to slurmctld: {idle['requests_per_minute']:.0f} a minute by an idle site, "
        f"{busy['requests_per_minute']:.0f} with {busy['leases']} leases and {busy['clients']} clients that "
        f"got {busy['answers_to_clients']:,} answers from the site meanwhile."
    )


def _main_job(one: dict[str, Any]) -> str:
    alone, beside = (
        f"{one[f'{mode}_full_speed_ms_p50']:.1f} ms, at worst {one[f'{mode}_full_speed_ms_worst']:.1f} ms"
        for mode in ("alone", "beside")
    )
    return (
        f"`search_docstrings.py`, unchanged, on what a batch job left idle: {one['docstrings_per_s']:,.0f} "
        f"docstrings a second, {one['calls']:,} calls busy for {one['busy_core_s']:.1f} s. The batch job was "
        f"{one['half_slowdown_percent']:.1f} % slower with half of its cores busy and "
        f"{one['bursts_slowdown_percent']:.1f} % in bursts on all; its threads then ran at full speed after "
        f"{beside} (alone {alone})."
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _pair(quantiles: dict[str, float] | None) -> str:
    return f"{quantiles['p50']:.1f} / {quantiles['p99']:.1f}" if quantiles else ""


def _caption(document: dict[str, Any]) -> str:
    load = document["load_average"]
    harvest, peers = document["parts"].get("harvest"), document["parts"].get("peers")
    shapes = [
        f"harvesting on one virtual node of {harvest['cores']} cores, interleaved rounds: {harvest['rounds']}"
        if harvest else "",
        f"leases on {peers['nodes']} virtual nodes of the same machine, taking turns" if peers else "",
    ]  # fmt: skip
    return (
        f"{document['machine']['line']}; real Slurm ({', '.join(filter(None, shapes))}); "
        f"{document['started'][:10]}, commit {document['machine']['commit']}; load {load['start']:.2f} to "
        f"{load['end']:.2f}{'; quick run' if document['quick'] else ''}."
    )


def replaced(readme: str, table: str) -> str:
    """The text with the table between its marks. Raises ValueError where it has none."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN.strip()} ... {END} in it")
    return f"{before}{begin}{table}\n{end}{after}"


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m benchmarks.slurm_table RESULT.json [README.md]")
    table = render(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    print(table)
    if len(sys.argv) == 3:
        readme = Path(sys.argv[2])
        readme.write_text(replaced(readme.read_text("utf-8"), table), "utf-8")


if __name__ == "__main__":
    main()
