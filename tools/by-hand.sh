#!/usr/bin/env bash
# What to type next, after `make run`.
cat <<'T'

To do the same by hand:
  source .venv/bin/activate
  isthmus up --detach                          # a site of your own, on this machine
  python examples/search_docstrings.py --query "parse command line options"
  isthmus status ; isthmus leases --ended ; isthmus usage ; isthmus explain LEASE
  isthmus down
T
