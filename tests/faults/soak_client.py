"""One client of the soak: calls without end, a journal of what was accepted and how it ended, its checker.

    python -m tests.faults.soak_client URL JOURNAL SEED          the key is in ISTHMUS_CLIENT__API_KEY

The journal is JSON lines, each written with one `write` so that a SIGKILL cannot cut the others: `accepted`
before a call's future is in anybody's hands, `ended` from its done-callback, `finished` when the client ended
in order.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import isthmus
from isthmus.core.discovery import Endpoint
from isthmus.sdk.futures import Future

BATCH_MAX = 60
OUTCOME_S = 60.0
RESULT_S = 60.0
PAUSE_S = 0.2


def work(number: int, duration_s: float) -> int:
    time.sleep(duration_s)
    return number * 7 + 1


def expected(number: int) -> int:
    return number * 7 + 1


class Journal:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, **line: Any) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


class Client:
    def __init__(self, site: isthmus.Site, journal: Journal, seed: int) -> None:
        self._site = site
        self._journal = journal
        self._random = random.Random(seed)
        self._number = seed << 32
        self.stopping = False

    def run(self) -> None:
        """Until SIGTERM; then everything that was accepted has ended, or is in the journal as hung."""
        acts = (self._submit_batch, self._submit_batch, self._map, self._submit_durable)
        while not self.stopping:
            self._random.choice(acts)()
        self._journal.write(event="finished")

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _duration_s(self) -> float:
        return self._random.choice((0.0, 0.0, 0.0, 0.001, 0.02, 0.2))

    def _submit_batch(self) -> None:
        futures = []
        for _ in range(self._random.randint(1, BATCH_MAX)):
            number = self._next()
            self._journal.write(event="accepted", number=number, how="submit")
            future = self._site.submit(work, number, self._duration_s())
            future.add_done_callback(lambda future, number=number: self._ended(number, future))
            futures.append(future)
        for future in wait(futures, timeout=OUTCOME_S).not_done:
            self._journal.write(event="hung", future=repr(future))

    def _map(self) -> None:
        numbers = [self._next() for _ in range(self._random.randint(1, BATCH_MAX))]
        for number in numbers:
            self._journal.write(event="accepted", number=number, how="map")
        durations = [self._duration_s() for _ in numbers]
        results = self._site.map(work, numbers, durations, return_exceptions=True)
        for number, result in zip(numbers, results, strict=True):
            self._journal.write(event="ended", number=number, **_outcome(result))

    def _submit_durable(self) -> None:
        number = self._next()
        try:
            future = self._site.submit(
                work, number, self._duration_s(), durable=True, idempotency_key=f"soak-{number}"
            )
        except isthmus.IsthmusError as error:
            self._journal.write(event="declined", number=number, error=type(error).__name__)
            time.sleep(PAUSE_S)
            return
        self._journal.write(event="accepted", number=number, how="durable", call=str(future.call_id))

    def _ended(self, number: int, future: "Future[int]") -> None:
        outcome = "cancelled" if future.cancelled() else future.exception() or future.result()
        self._journal.write(event="ended", number=number, **_outcome(outcome))


def _outcome(result: Any) -> dict[str, Any]:
    if isinstance(result, BaseException):
        typed = isinstance(result, isthmus.IsthmusError)
        return {"error": type(result).__name__, "typed": typed, "text": str(result)[:300]}
    return {"value": result}


def check(journals: list[Path], endpoint: Endpoint) -> dict[str, Any]:
    """What the journals say, durable results fetched: counts, and one line for each broken promise."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    durable: dict[int, str] = {}
    for path in journals:
        lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]
        durable |= {line["number"]: line["call"] for line in lines if line.get("how") == "durable"}
        failures += _check_journal(path.name, lines, counts)
    failures += _check_durable(durable, endpoint, counts)
    return {
        "counts": dict(sorted(counts.items())),
        "failures": failures[:50],
        "failures_total": len(failures),
    }


def _check_journal(name: str, lines: list[dict[str, Any]], counts: Counter[str]) -> list[str]:
    accepted = {line["number"] for line in lines if line["event"] == "accepted" and line["how"] != "durable"}
    ends = Counter(line["number"] for line in lines if line["event"] == "ended")
    finished = any(line["event"] == "finished" for line in lines)
    failures = [f"{name}: hung: {line['future']}" for line in lines if line["event"] == "hung"]
    failures += [f"{name}: call {number} ended {times} times" for number, times in ends.items() if times > 1]
    if finished:
        failures += [f"{name}: call {number} never ended" for number in accepted - set(ends)]
    counts["accepted"] += len(accepted)
    counts["killed with their client"] += 0 if finished else len(accepted - set(ends))
    counts["declined durable"] += sum(line["event"] == "declined" for line in lines)
    for line in lines:
        if line["event"] == "ended":
            failures += _check_end(name, line, counts)
    return failures


def _check_end(name: str, line: dict[str, Any], counts: Counter[str]) -> list[str]:
    if "error" in line:
        counts[line["error"]] += 1
        return [] if line["typed"] else [f"{name}: call {line['number']}: {line['error']}: {line['text']}"]
    counts["right value"] += 1
    wrong = line["value"] != expected(line["number"])
    return [f"{name}: call {line['number']} gave {line['value']}"] if wrong else []


def _check_durable(calls: dict[int, str], endpoint: Endpoint, counts: Counter[str]) -> list[str]:
    failures = []
    with isthmus.connect(endpoint.url, api_key=endpoint.key) as site:
        for number, call in calls.items():
            try:
                value = site.result(call, timeout_s=RESULT_S)
            except isthmus.IsthmusError as error:
                failures.append(f"durable {call}: {type(error).__name__}: {error}")
                continue
            counts["durable results"] += 1
            if value != expected(number):
                failures.append(f"durable {call} gave {value}, not {expected(number)}")
    return failures


def main(url: str, journal: str, seed: str) -> None:
    with isthmus.connect(url, api_key=os.environ["ISTHMUS_CLIENT__API_KEY"]) as site:
        client = Client(site, Journal(Path(journal)), int(seed))

        def stop(*_: object) -> None:
            client.stopping = True

        signal.signal(signal.SIGTERM, stop)
        client.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
