"""Semantic search over the docstrings of Python's standard library, embedded on leased cores."""

import argparse
import ast
import sysconfig
import time
from pathlib import Path

import numpy as np
from minilm import model

import isthmus

QUESTIONS = ["run a function after a delay", "how similar are two texts", "make a secure random token"]
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
BATCH = 32


def read_corpus(limit: int | None) -> list[tuple[str, str]]:
    """(docstring, name) of all modules, classes and functions of the standard library, shortest first."""
    documents = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if SKIPPED.isdisjoint(path.parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text) > 30:
                        documents.setdefault(text, f"{path.stem}.{getattr(node, 'name', '')}".rstrip("."))
    step = max(len(documents) // (limit or len(documents)), 1)
    return sorted(list(documents.items())[::step], key=lambda item: len(item[0]))  # little padding


@isthmus.function(isthmus.Resources(cores=1, memory="1GiB"))
def embed(texts: list[str]) -> np.ndarray:
    return model().encode(texts)


@isthmus.function  # one core and 1 GiB, too: it runs on the same executors
def nothing() -> None:
    pass


def measure(site: isthmus.Site) -> None:
    site.call(nothing)  # cold: a lease must be had first
    for _ in range(2000):
        site.call(nothing)  # hot: the executor spins for the next call
    for _ in range(20):
        time.sleep(0.02)
        site.call(nothing)  # warm: it went to sleep meanwhile
    print(f"latency     {site.latency()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--query", action="append", help="what to look for; may be repeated")
    parser.add_argument("--limit", type=int, help="embed about this many docstrings")
    options = parser.parse_args()
    corpus = read_corpus(options.limit)
    batches = [[text for text, _ in corpus[i : i + BATCH]] for i in range(0, len(corpus), BATCH)]
    with isthmus.connect() as site:
        print(f"site        {site.url}")
        measure(site)
        start_s = time.perf_counter()
        index = np.vstack(list(site.map(embed, batches, progress=True)))
        print(f"throughput  {len(corpus) / (time.perf_counter() - start_s):,.0f} docstrings a second")
        for question in options.query or QUESTIONS:
            scores = index @ site.call(embed, [question])[0]
            print(f"\n  {question}?")
            for best in np.argsort(scores)[::-1][:3]:
                text, name = corpus[best]
                print(f"    {scores[best]:.2f}  {name:<34} {text.splitlines()[0][:60]}")
        for row in site.bill():
            kinds = f"held {row.allocated_core_s:.1f}, busy {row.busy_core_s:.1f}, spin {row.spin_core_s:.2f}"
            print(f"\nbill        {row.lease_class} core-seconds: {kinds}; {row.calls:,} calls")


if __name__ == "__main__":
    main()
