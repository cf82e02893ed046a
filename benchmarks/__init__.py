"""Measure what DESIGN promises, beside floors and peers, in one run. `python -m benchmarks --help`.

One file per claim at the top of this folder; `peers/` and `floors/` hold what it is compared with; `harness/`
runs, summarises and judges. Nothing here is imported by isthmus.
"""
