# Everything a person or CI needs. `make help` lists the targets.
#   PYTHON=python3.12 make setup     another interpreter (3.11 or newer)
#   ARGS="--port 8000" make serve    arguments for the command behind the target
#   GPU=1 make setup                 with PyTorch for an NVIDIA GPU; by default only where its driver is found (GPU=0: never)
#   EXTRAS=transformers make setup   with optional packages: transformers, plot, fa3, top
#   JOBS=0 make test                 in one process, for a debugger
#   PIP_ARGS=...                     arguments for pip, for example an index with CPU-only torch
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup kernels packages dev serve test test-fast test-gpu test-oracles test-load test-mutants test-random test-apart test-isa test-templates test-fleet test-pages test-dashboard wheel test-wheel check lint types imports routers fleet training format bench docs clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 4
EXTRAS ?=
PIP_ARGS ?=
GPU ?= $(if $(shell command -v nvidia-smi)$(wildcard /proc/driver/nvidia /dev/nvidia0),1,0)
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# a stamp for each group of packages, so that a target installs what it lacks and nothing twice
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
RELEASE := $(VENV)/.installed-release
ROUTERS := .venv-routers/.installed
FLEET := .venv-ray/.installed
TRAINING := .venv-training/.installed
WANTED = $(INSTALLED) $(if $(filter 1,$(GPU)),$(VENV)/.installed-gpu) $(EXTRAS:%=$(VENV)/.installed-%)
KERNELS := $(VENV)/.kernels-built
KERNEL_SOURCES := $(shell find src/headwater/devices/cpu/kernels -name '*.[ch]') src/headwater/devices/cpu/kernel_build.py

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

# the kernels are compiled while pip downloads
setup: | $(BIN)/python  ## Make .venv and install what serving needs into it (quick when nothing changed)
	@$(MAKE) --no-print-directory kernels & kernels=$$!; $(MAKE) --no-print-directory packages && wait $$kernels

packages: $(WANTED)
	@:
kernels: $(KERNELS)
	@:
dev: setup $(DEV)  ## Install what tests and checks need as well

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing what serving needs into $(VENV): 40 MB to download, 200 MB of disk, less than a minute at 100 Mbit/s."
	$(PIP_INSTALL) --no-compile -e .
	@$(BIN)/python -m compileall -q -j 0 -x '/(tests|pip|setuptools|pkg_resources|_vendor|f2py|mutants)/' $(VENV)/lib src || true
	@touch $@

$(VENV)/.installed-%: $(INSTALLED)
	@case $* in gpu|fa3|dev) \
	  echo "Installing the extra '$*' into $(VENV), with PyTorch. Its default build for Linux brings CUDA: 2 to 3 GB to download"; \
	  echo "and 6 GB of disk, about 5 minutes at 100 Mbit/s. Without an NVIDIA GPU, set PIP_ARGS to an index with CPU-only builds"; \
	  echo "of PyTorch (pytorch.org has one): 600 MB, 2 minutes. pip tells how it goes:";; esac
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

# Where no compiler serves, clang comes from PyPI for this one time. Without any, the server computes in numpy and says so.
BUILD_KERNELS := $(BIN)/python -m headwater.devices.cpu.kernel_build
$(KERNELS): $(KERNEL_SOURCES) | $(BIN)/python
	@PYTHONPATH=src $(BUILD_KERNELS) || { \
	  echo "Fetching clang for them: the wheel ziglang, 101 MB, removed afterwards"; \
	  zig=$$(mktemp -d $(VENV)/zig.XXXXXX); trap 'rm -rf "$$zig"' EXIT; \
	  $(PIP_INSTALL) --no-compile --target "$$zig" ziglang && \
	  ZIG_GLOBAL_CACHE_DIR="$$zig/cache" PYTHONPATH="src:$$zig" $(BUILD_KERNELS); } || true
	@touch $@

serve: setup  ## Serve the default model on 127.0.0.1:30000
	@$(BIN)/headwater serve $(ARGS)

# in the order of the folders: by the number of tests, the files with one long test would come last, one after another
# with bytecode, or each of them would rewrite the assertions of all files, in every run
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test test-gpu test-oracles test-load test-mutants test-random test-apart: export PYTHONDONTWRITEBYTECODE =
test: dev  ## All tests but those of the targets below, fast and slow, in JOBS processes
	$(PYTEST) -m "not (gpu or oracle or load or mutants or random or emulated or fleet)" $(ARGS)

# the folders that hold such tests, so that no others are collected
test-gpu: dev  ## What a GPU runs: runner, attention, kernels; interpreted where there is no GPU
	$(PYTEST) -m gpu tests/devices tests/engine tests/execution $(ARGS)
test-oracles: dev  ## Long texts of the default model beside other computations of the same, and 64 streams across updates
	$(PYTEST) -m oracle tests/e2e/training tests/execution tests/launch $(ARGS)
test-load: dev  ## Real servers under load, while stores fail and engines are killed; 120 flushes in a rollout loop
	$(PYTEST) -m load tests/e2e $(ARGS)
test-mutants: dev  ## Engines, caches and fronts that are wrong on purpose: each must be noticed
	$(PYTEST) -m mutants tests/cache tests/fleet tests/simulation $(ARGS)
test-random: dev  ## Random runs and requests from a fresh seed: HEADWATER_SIMULATION_S=60 HOSTILE_REQUESTS=120 for more
	$(PYTEST) -m random tests/http_api tests/simulation $(ARGS)
# those with one long test first
test-apart: dev  ## These five in one run, as CI does: they overlap, and are collected once
	$(PYTEST) -m "gpu or oracle or load or mutants or random" tests/simulation tests/execution tests/e2e tests/launch \
	  tests/cache tests/http_api tests/devices tests/engine tests/fleet $(ARGS)

# a library for each instruction set that the processor runs, and numpy without any
ISA_TESTS := tests/devices/cpu/test_cpu_layers.py tests/devices/test_step_attention.py tests/models/test_loader.py
ISA_PYTEST = $(BIN)/python -m pytest -q -m "not emulated" -k "not cuda" $(ISA_TESTS)
ISAS = $$($(BIN)/python -c 'from headwater.devices.cpu.kernel_build import usable_instruction_sets as f; print(*(i.name for i in f()))')
COMPILING := tests/release/all_sets_compile.py tests/devices/cpu/under_sanitizers.py tests/devices/cuda/kernels_compile.py
test-isa: dev  ## The CPU's layers, attention and loading with each set of kernels, and without; sanitizers; all kernels compile
	$(BIN)/python -m pytest -q $(COMPILING)
	$(BIN)/python -m pytest -q -m emulated tests/devices/cpu
	for isa in $(ISAS); do HEADWATER_CPU_ISA=$$isa $(ISA_PYTEST) || exit 1; done
	HEADWATER_NATIVE=0 $(ISA_PYTEST)

# other people's files, so they are fetched and not kept: 76 MB, in llama-cpp-python's sources
test-templates: dev  ## Official chat templates, rendered beside transformers
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
	  --dest "$$folder" llama-cpp-python==0.3.36 && \
	tar xzf "$$folder"/*.tar.gz -C "$$folder" --wildcards '*/llama.cpp/models/templates/*.jinja' && \
	HEADWATER_CHAT_TEMPLATES=$$(dirname "$$(find "$$folder" -name 'Qwen-*.jinja' | head -n 1)") \
	  $(BIN)/python -m pytest -q tests/tokenization/test_templates_of_models.py tests/generation/tool_formats/test_tool_formats.py

# for tests/e2e/routers/test_dynamo_events.py; a wheel for Linux
routers: $(ROUTERS)  ## Make .venv-routers with the index of NVIDIA Dynamo's router: 75 MB to download
$(ROUTERS): Makefile
	@$(PYTHON) -m venv .venv-routers
	.venv-routers/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) ai-dynamo-runtime==1.6.1
	@touch $@

# for `make test-fleet`; Ray is heavy and brings packages of its own, so it has an environment of its own
fleet: $(FLEET)  ## Make .venv-ray with Ray, for the tests of fleets: 130 MB to download
$(FLEET): Makefile pyproject.toml
	@$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -e '.[ray]' 'ray[serve]==2.60.0'
	@touch $@

# trl on the packages of .venv, which has PyTorch and transformers
training: $(TRAINING)  ## Make .venv-training with trl, for tests/e2e/training: 75 MB to download
$(TRAINING): Makefile $(DEV)
	@$(BIN)/python -m venv .venv-training
	@$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  $$(.venv-training/bin/python -c 'import site; print(site.getsitepackages()[0])')/headwater-dev.pth
	.venv-training/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS) \
	  trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 requests
	@touch $@

test-fleet: dev $(FLEET)  ## The tests of a fleet on Ray: one to three minutes on two cores
	$(BIN)/python -m pytest tests/e2e/fleet/test_fleet_on_ray.py $(ARGS)

test-pages: dev  ## The commands of the pages that start servers or take seconds of CPU; `make test` runs the others
	$(BIN)/python -m pytest tests/pages/page_servers.py $(ARGS)

test-dashboard: dev  ## Every query of the Grafana dashboard, asked of a real Prometheus (apt-get install prometheus); 2 min
	$(BIN)/python integrations/monitoring/dashboard_queries.py $(ARGS)

test-fast: dev  ## The tests that need neither torch nor a model
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# dist/ is what a release publishes; zig's clang compiles for every platform on this one
wheel: setup $(RELEASE)  ## Build the wheels of all platforms and the source archive into dist/
	$(BIN)/python release/build_wheels.py $(ARGS)

test-wheel: setup $(RELEASE)  ## Build this platform's wheel, install it elsewhere, serve from it without a compiler
	$(BIN)/python release/build_wheels.py --platform here
	$(BIN)/python release/check_wheel.py

check: lint types imports  ## ruff, pyright on src, import-linter

lint: dev
	$(BIN)/ruff check src tests benchmarks integrations release deploy
types: dev
	$(BIN)/pyright
imports: dev
	$(BIN)/lint-imports

format: dev  ## Sort imports and mend what ruff can mend
	$(BIN)/ruff check --fix src tests benchmarks integrations release deploy

bench: setup $(BENCH)  ## Load the default model with the workloads W1 to W4
	$(BIN)/python benchmarks/serving/run.py $(ARGS)

# nothing is fetched while it builds; the hooks import the package, for the reference pages
docs: setup $(VENV)/.installed-docs  ## Build the documentation as a site into build/site, with the reference pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .venv-routers .venv-ray .venv-training .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist src/*.egg-info
