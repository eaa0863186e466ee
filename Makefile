# Everything a person or CI needs. `make help` lists the targets.
#   PYTHON=python3.12 make setup     another interpreter (3.11 or newer)
#   ARGS="--port 8000" make serve    arguments for the command behind the target
#   JOBS=0 make test                 in one process, for a debugger
#   PIP_ARGS=...                     arguments for pip, for example an index with CPU-only torch
.DEFAULT_GOAL := help
.PHONY: help setup serve test test-fast check lint types imports format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels-built
KERNEL_SOURCES := $(wildcard src/headwater/devices/native/*)
ARGS ?=
JOBS ?= 2
PIP_ARGS ?=

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(INSTALLED) $(KERNELS)  ## Make .venv and install everything into it (quick when nothing changed)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

# optional: without a compiler or on another CPU the server computes in plain PyTorch, and says so
$(KERNELS): $(INSTALLED) $(KERNEL_SOURCES)
	@$(BIN)/python -m headwater.devices.native_build
	@touch $@

serve: setup  ## Serve the default model on 127.0.0.1:30000
	@$(BIN)/headwater serve $(ARGS)

# passive: threads that wait for others would keep the other process's from the cores
test: setup  ## All tests, fast and slow, in JOBS processes
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-fast: setup  ## The tests that need neither torch nor a model
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

check: lint types imports  ## ruff, pyright on src, import-linter

lint: setup
	$(BIN)/ruff check src tests benchmarks
types: setup
	$(BIN)/pyright
imports: setup
	$(BIN)/lint-imports

format: setup  ## Sort imports and mend what ruff can mend
	$(BIN)/ruff check --fix src tests benchmarks

bench: setup  ## Load the default model with the workloads W1 to W4
	$(BIN)/python benchmarks/serving/run.py $(ARGS)

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist src/*.egg-info
