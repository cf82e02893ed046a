# isthmus: `make run` shows the main job, `make test` runs the whole suite; both set up everything they need.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
SEED ?= 1
SEEDS ?= 1000
MINUTES ?= 30
SOURCES := pyproject.toml CMakeLists.txt $(shell find src native -type f -not -name '*.pyc' -not -name '*.so' 2>/dev/null)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.run: $(SOURCES) tools/setup.sh
	@tools/setup.sh run $(PYTHON) $(VENV)
$(VENV)/.test: $(SOURCES) tools/setup.sh
	@tools/setup.sh test $(PYTHON) $(VENV)

run: $(VENV)/.run  ## set up, start an embedded site, run the main job on real input, leave nothing behind
	@cd examples && ../$(BIN)/python search_docstrings.py $(ARGS)
	@tools/by-hand.sh

test: $(VENV)/.test  ## set up and run the whole test suite
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(VENV)/.test  ## format, lint, types, import contracts, native style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	tools/check-native.sh

test-rdma: $(VENV)/.test  ## boot a guest with soft RoCE and run the fabric over rc_verbs in it
	$(BIN)/python tools/rdma/guest.py run-tests

simulate: $(VENV)/.test  ## SEED=first SEEDS=count: the control plane on a fake clock with faulty parts
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --seed $(SEED)

bench: $(VENV)/.test  ## every benchmark, peers side by side; ARGS='--quick --no-peers' for less
	$(BIN)/python -m benchmarks $(ARGS)

bench-slurm: $(VENV)/.test  ## on a real Slurm cluster: harvesting, leases beside peers, preempted calls; ARGS=--quick for less
	$(BIN)/python -m benchmarks.slurm $(ARGS)

soak: $(VENV)/.test  ## MINUTES=30 of random kills under load
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

clean:  ## remove what the other targets made
	rm -rf $(VENV) build dist .peers .rdma .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find src -name '*.so' -delete

.PHONY: help run test check test-rdma simulate bench bench-slurm soak clean
