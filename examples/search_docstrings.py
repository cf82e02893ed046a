"""Semantic search over the docstrings of Python's standard library, embedded by functions on leased cores.

    python examples/search_docstrings.py                        # on this machine, or on the site you are logged in to
    python examples/search_docstrings.py --query "merge two sorted lists"
"""

import argparse
import ast
import sysconfig
import time
from pathlib import Path

import numpy as np
from minilm import model

import isthmus

QUESTIONS = ("run a function after a delay", "find the longest matching part of two texts", "make a secure random token")
BATCH = 32
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib"}


def read_corpus(limit: int | None) -> list[tuple[str, str]]:
    """(dotted name, docstring) of every module, class and function of the standard library, shortest first."""
    documents = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if SKIPPED.isdisjoint(path.parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text) > 30:
                        documents.setdefault(text, f"{path.stem}.{getattr(node, 'name', '')}".rstrip("."))
    corpus = [(name, text) for text, name in documents.items()]
    return sorted(corpus[:limit], key=lambda document: len(document[1]))  # equal lengths waste no padding


@isthmus.function(isthmus.Resources(cores=1, memory="2GiB"))
def embed(texts: list[str]) -> np.ndarray:
    return model().encode(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--query", action="append", help="what to look for; may be repeated")
    parser.add_argument("--limit", type=int, help="embed only this many docstrings")
    options = parser.parse_args()
    corpus = read_corpus(options.limit)
    batches = [[text for _, text in corpus[i : i + BATCH]] for i in range(0, len(corpus), BATCH)]
    with isthmus.connect() as site:
        start = time.perf_counter()
        index = np.vstack(list(site.map(embed, batches, progress=True)))
        took_s = time.perf_counter() - start
        print(f"\nembedded {len(corpus):,} docstrings in {took_s:.1f} s: {len(corpus) / took_s:,.0f} a second")
        for question in options.query or QUESTIONS:
            scores = index @ site.call(embed, [question])[0]
            print(f"\n  {question}?")
            for rank in np.argsort(scores)[::-1][:3]:
                print(f"    {scores[rank]:.2f}  {corpus[rank][0]:<34} {corpus[rank][1].splitlines()[0][:64]}")
        print(f"\n{site.latency()}\n\n{site.bill()}")


if __name__ == "__main__":
    main()
