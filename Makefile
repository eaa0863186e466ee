# Everything a person or CI needs. `make help` lists the targets.
#   PYTHON=python3.12 make setup     another interpreter (3.11 or newer)
#   ARGS="--port 8000" make serve    arguments for the command behind the target
#   JOBS=0 make test                 in one process, for a debugger
#   PIP_ARGS=...                     arguments for pip, for example an index with CPU-only torch
.DEFAULT_GOAL := help
.PHONY: help setup serve test test-fast test-isa test-templates check lint types imports format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels-built
KERNEL_SOURCES := $(wildcard src/headwater/devices/cpu/kernels/*.[ch] src/headwater/devices/cpu/kernels/*/*.[ch])
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
	@echo "Installing what pyproject.toml names into $(VENV). The first time that is 2 to 3 GB to download, nearly all of it"
	@echo "PyTorch with CUDA, and 6 GB of disk: about 5 minutes at 100 Mbit/s. Without an NVIDIA GPU, stop now and set PIP_ARGS"
	@echo "to an index with CPU-only builds of PyTorch (pytorch.org has one): 600 MB, 2 minutes. pip tells how it goes:"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

# optional: without a compiler or on another CPU the server computes in numpy, and says so
$(KERNELS): $(INSTALLED) $(KERNEL_SOURCES)
	@$(BIN)/python -m headwater.devices.cpu.kernel_build
	@touch $@

serve: setup  ## Serve the default model on 127.0.0.1:30000
	@$(BIN)/headwater serve $(ARGS)

# in the order of the folders: by the number of tests, the files with one long test would come last, one after another
test: setup  ## All tests, fast and slow, in JOBS processes
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# a library for each instruction set that the processor runs, and numpy without any
ISA_TESTS := tests/devices/cpu/test_cpu_layers.py tests/devices/test_step_attention.py tests/models/test_loader.py
ISAS = $$($(BIN)/python -c 'from headwater.devices.cpu.kernel_build import usable_instruction_sets as f; print(*(i.name for i in f()))')
test-isa: setup  ## The CPU's layers, attention and loading with each set of kernels, and without
	for isa in $(ISAS); do HEADWATER_CPU_ISA=$$isa $(BIN)/python -m pytest -q -k "not cuda" $(ISA_TESTS) || exit 1; done
	HEADWATER_NATIVE=0 $(BIN)/python -m pytest -q -k "not cuda" $(ISA_TESTS)

# other people's files, so they are fetched and not kept: 76 MB, in llama-cpp-python's sources
test-templates: setup  ## Official chat templates, rendered beside transformers
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
	  --dest "$$folder" llama-cpp-python==0.3.36 && \
	tar xzf "$$folder"/*.tar.gz -C "$$folder" --wildcards '*/llama.cpp/models/templates/*.jinja' && \
	HEADWATER_CHAT_TEMPLATES=$$(dirname "$$(find "$$folder" -name 'Qwen-*.jinja' | head -n 1)") \
	  $(BIN)/python -m pytest -q tests/tokenization/test_templates_of_models.py

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
