# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first; a second call installs nothing.
PYTHON ?= python3
SLURM_TESTS ?= test
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)
# Containers often set it. The tests start hundreds of processes, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

DOCS       := .venv-docs
DOCS_STAMP := $(DOCS)/installed-$(shell cksum requirements-docs.lock | cut -d' ' -f1)

# A folder made by `make wheels` replaces the network.
ifneq ($(wildcard wheels/*.whl),)
export PIP_NO_INDEX = 1
export PIP_FIND_LINKS = $(CURDIR)/wheels
wheels lock docs test-oldest $(DOCS_STAMP): export PIP_NO_INDEX = 0
endif

# The oldest torch of the library; pyproject.toml has the same.
OLDEST = 2.6.0

.PHONY: setup demo test test-fast test-oldest lint docs bench bench-full bench-small bench-gpu wheels test-gpu test-slurm test-faults test-mutants wheel results lock clean help

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## create .venv and install the locked dependencies

# pip compiles no bytecode: Python compiles what it imports, which is a small part.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"this is Python {v[0]}.{v[1]}, but 3.11 to 3.13 is needed: make setup PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@rm -f $(VENV)/installed-*
	@touch $@

demo: setup ## AdamW, Lion and Sophia-G on the embedded corpus: a table and a plot
	$(BIN)/python scripts/demo.py

test: setup ## the test suite, on three workers because many tests wait
	$(BIN)/python -m pytest -n 3 --dist worksteal -m "not gpu and not slurm"

test-fast: setup ## the quick tests of every package: under 90 seconds
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu and not slurm"

lint: setup ## ruff (lint and format), mypy, and the rules of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# With --quiet, mkdocs would not count the warnings that its strict mode fails on.
docs: $(DOCS_STAMP) ## the documentation site, into site/; broken links and missing references fail
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

$(DOCS_STAMP): requirements-docs.lock
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock
	@rm -f $(DOCS)/installed-*
	@touch $@

bench: setup ## speed and memory: optimizer step, training step at 30M (ten minutes, on a quiet machine)
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/page.py

bench-full: bench ## bench, and the 124M model, data, scaling, planned against measured memory (over an hour)
	$(BIN)/python benchmarks/training_step.py --size 124m
	$(BIN)/python benchmarks/data_pipeline.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/page.py

bench-small: setup ## whole runs of small models, against an earlier commit (25 minutes)
	$(BIN)/python benchmarks/small_models.py
	$(BIN)/python benchmarks/page.py

bench-gpu: setup ## what depends on the device, on one GPU: tests, speed, memory, a run (ten minutes)
	$(BIN)/python benchmarks/gpu.py

wheels: ## fill wheels/ with all that make setup installs, for a machine without network (gigabytes)
	$(PYTHON) -m pip wheel --quiet --wheel-dir wheels -r requirements.lock hatchling editables

test-gpu: setup ## the device-dependent tests, on CUDA
	$(BIN)/python -m pytest -m gpu

test-slurm: setup ## a sweep on a SLURM of one node, set up here (root; Debian: apt-get install slurm-wlm munge)
	$(BIN)/python -m pytest tests/slurm -m slurm -ra -k "$(SLURM_TESTS)"

test-oldest: ## the library's tests on the oldest torch that it supports (downloads gigabytes)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet "torch==$(OLDEST)" numpy hypothesis pytest pytest-timeout
	.venv-oldest/bin/python -m pytest -q tests/sophia

test-mutants: setup ## mutation tests: insert one bug at a time and check that the suite finds it (half an hour)
	$(BIN)/python -m tests.mutants

test-faults: setup ## fault injection: kills, corruption, full disks, bad input (half an hour; writes docs/reliability.md; root for full disks)
	$(BIN)/python -m tests.faults

wheel: ## build the library's wheel into dist/, and train with it where torch is all that is installed
	rm -rf dist .venv-wheel && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	.venv-wheel/bin/python -m pip install --quiet dist/torch_sophia-*.whl
	.venv-wheel/bin/python -I examples/plain_loop.py --steps 20
	rm -rf .venv-wheel

results: setup ## reports, figures and the README's section from the records in results/
	$(BIN)/python scripts/results.py

lock: ## resolve pyproject.toml's version ranges into requirements.lock and requirements-docs.lock
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "torch~=2.13.0"
	.venv-lock/bin/python -m pip install --quiet ".[train,evaluate,arms,dev]"
	.venv-lock/bin/python -m pip freeze --exclude torch-sophia | sed -E 's/\+cpu$$//; /^(nvidia-[a-z0-9-]+-cu1|triton|cuda-)/d' > requirements.lock
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' | \
	    .venv-lock/bin/python -m pip install --quiet -r /dev/stdin
	.venv-lock/bin/python -m pip freeze > requirements-docs.lock
	rm -rf .venv-lock

# Not runs, tokens and wheels, which take hours to make again.
clean: ## remove the virtual environments, the caches and the site
	rm -rf $(VENV) $(DOCS) .venv-oldest .venv-lock .venv-wheel site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './runs/*' -not -path './tokens/*' -prune -exec rm -rf {} +
