# Each target sets up what it needs: Python 3.10 or newer, make and a package index are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint rules format types slow wheel versions coverage pairing-table gpu-test memcheck bench bench-plots budget-table clean

help:
	@echo "make demo      run a stand-in pipeline resident and streamed, compare the images (ARGS=... for options)"
	@echo "make test      the tests that need no GPU"
	@echo "make lint      ruff: rules and format"
	@echo "make types     mypy, strict"
	@echo "make slow      the long tests: examples, the stand-in demo, a wheel, sweeps"
	@echo "make wheel     source distribution and wheel in dist, and the wheel tried in an empty environment"
	@echo "make versions  the quick tests with the oldest and newest Python, torch and diffusers: docs/versions.md"
	@echo "make coverage  what streams of every class of diffusers, and what tests it: docs/coverage.md; takes a minute"
	@echo "make pairing-table  which tiny pipelines' passes are paired: docs/pairing.md; takes five minutes"
	@echo "make gpu-test  the tests that need a CUDA GPU"
	@echo "make memcheck  the codec's kernels under compute-sanitizer, which needs a CUDA GPU"
	@echo "make bench     the benchmark harness (ARGS='run --case ovis', 'suite NAME', 'list')"
	@echo "make bench-plots   pictures, and the tables of README.md and benchmarks/README.md, from benchmarks/results"
	@echo "make budget-table  the tables of docs/choosing-a-budget.md and several_gpus.md, by the planner; takes two minutes"
	@echo "make clean     remove the virtual environment and caches"

# Made again when what it installs has changed. pip and setuptools come first, because the pins are theirs too.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Setting up $(VENV); this takes a minute, and happens once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install -qq --constraint constraints.txt --no-build-isolation --editable ".[demo]" --group dev
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python -m layerstream demo $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: rules format

rules: $(INSTALLED)
	$(BIN)/python -m ruff check .

format: $(INSTALLED)
	$(BIN)/python -m ruff format --check .

types: $(INSTALLED)
	$(BIN)/python -m mypy

# pytest says 5 when there is no such test.
slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS) || [ $$? -eq 5 ]

wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m tools.try_wheel

# Environments of their own, in .versions: ARGS="oldest" for one of them, ARGS=--list for their names.
versions:
	$(PYTHON) -m tools.versions $(ARGS)

coverage: $(INSTALLED)
	$(BIN)/python -m tools.coverage

pairing-table: $(INSTALLED)
	$(BIN)/python -m tools.pairing

gpu-test: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu $(ARGS) || [ $$? -eq 5 ]

memcheck: $(INSTALLED)
	$(BIN)/python -m tools.memcheck

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(ARGS)

bench-plots: $(INSTALLED)
	$(BIN)/python -m benchmarks plots

budget-table: $(INSTALLED)
	$(BIN)/python -m benchmarks.budget_table
	$(BIN)/python -m benchmarks.several_gpus

clean:
	rm -rf $(VENV) .wheel-venv .versions build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-*.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
