# `make demo` and `make test` are all a newcomer needs: each makes .venv and fills it when it is missing.
# Another interpreter: make demo PYTHON=python3.12      Without the GPU build: make demo EXTRA=cpu

PYTHON ?= python3
EXTRA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

BIN := .venv/bin
# Touched last, so an interrupted installation leaves none; a newer pyproject.toml makes it stale.
INSTALLED := .venv/.installed-$(EXTRA)
UNWANTED := $(if $(filter gpu,$(EXTRA)),onnxruntime,onnxruntime-gpu)

# Without it the folders kernels/ and export/ of this checkout could be imported under their bare names.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DELETE_ON_ERROR:
.PHONY: help install demo test lint contracts types kernels wheel wheel-test runtime-test bench bench-all clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-14s %s\n", $$1, $$2 }'

install: $(INSTALLED)  ## make .venv and install fastfsl with everything it needs (about 3 minutes, 5.5 GB)

$(INSTALLED): pyproject.toml
	@rm -f .venv/.installed-*
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "fastfsl needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
			echo "Name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
		$(PYTHON) -m venv --clear .venv; }
	@# onnxruntime and onnxruntime-gpu overwrite each other's files: where the other one is found, both go.
	@if $(BIN)/python -m pip show --quiet $(UNWANTED) 2>/dev/null; then \
		$(BIN)/python -m pip uninstall --yes onnxruntime onnxruntime-gpu; fi
	$(BIN)/python -m pip install --editable '.[dev,$(EXTRA)]'
	@touch $@

demo: $(INSTALLED)  ## train, export and classify on the embedded default; writes demo-out/
	$(BIN)/fastfsl demo --out demo-out --force

test: $(INSTALLED)  ## the fast test suite, a process a core
	$(BIN)/python -m pytest -n logical --dist loadfile

lint: $(INSTALLED) contracts  ## ruff, its formatter, who may import whom, README's tables against their results
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/tables.py --check

# Both read the sources through typetree/, where kernels/ and export/ lie below fastfsl/. lint-imports puts its working
# directory first on the path, so it has to start there.
contracts: $(INSTALLED)  ## who may import whom, room by room
	$(BIN)/python .ci/typetree.py
	cd typetree && ../$(BIN)/lint-imports --config ../pyproject.toml --no-cache --no-logo

types: $(INSTALLED)  ## mypy --strict over all rooms
	$(BIN)/python .ci/typetree.py
	$(BIN)/mypy

kernels: $(INSTALLED)  ## compile every kernel for every architecture, twice, without a card, and hold their budgets
	$(BIN)/python .ci/kernels_check.py $(KERNELS)

wheel: $(INSTALLED)  ## build dist/*.tar.gz and, from it, dist/*.whl; look into the wheel
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist
	$(BIN)/check-wheel-contents dist

wheel-test: wheel  ## import every module of the wheel, and test what users meet, away from the sources
	.ci/wheel-test

runtime-test: wheel demo-out/bundle/manifest.json  ## the wheel with [cpu] alone: no torch, small, quick to import
	.ci/runtime-test

demo-out/bundle/manifest.json:
	$(MAKE) demo

bench: $(INSTALLED)  ## the latency report (6 minutes): benchmarks/results/, README's tables, benchmarks/report.html
	$(BIN)/python -m pytest benchmarks --save-results; code=$$?; $(BIN)/python benchmarks/tables.py; exit $$code

bench-all: $(INSTALLED)  ## the trainings and the demo's five seeds as well (hours)
	$(BIN)/python -m pytest benchmarks -m "not gpu" --save-results; code=$$?; $(BIN)/python benchmarks/tables.py; exit $$code

clean:  ## remove what the other targets made, but for .venv
	rm -rf build dist demo-out typetree *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .import_linter_cache
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ruff_cache \) -type d -prune -exec rm -rf {} +
