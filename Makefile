# Every target does its own set-up in .venv. `make quickstart` is the main job, `make test` checks everything.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup quickstart test test-slurm recipes lint aot soak clean

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt setuptools torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/fusiontrain demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4

# A Slurm of two nodes on this machine, preempting, requeueing and cancelling real jobs: minutes. `tests/launch/mini_slurm.sh install` brings Slurm.
test-slurm: $(STAMP)
	FUSIONTRAIN_TEST_SLURM=1 $(BIN)/python -m pytest tests/launch/test_slurm.py

# The README's table of recipes, from the results of their tests, failures and all.
recipes: $(STAMP)
	-$(BIN)/python -m pytest tests/integration/test_recipes.py --junitxml runs/recipes.xml
	PYTHONPATH=.:kernels $(BIN)/python tests/repo/recipe_table.py runs/recipes.xml README.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# Compile every kernel config for GPUs that need not be here, and refuse spills.
aot: $(STAMP)
	PYTHONPATH=kernels $(BIN)/python -m fusiontrain_kernels._aot

# An hour or more: 200 kills at random moments, 1000 kinds of damage to a checkpoint, and two hosts in network namespaces (which need root).
soak: $(STAMP)
	PYTHONPATH=.:kernels $(BIN)/python tests/soak/kills.py --kills 200 --ranks 1,2,4 --out runs/soak
	PYTHONPATH=.:kernels $(BIN)/python tests/soak/flips.py
	PYTHONPATH=.:kernels $(BIN)/python tests/soak/two_hosts.py --out runs/two_hosts

clean:
	rm -rf $(VENV) build dist *.egg-info
