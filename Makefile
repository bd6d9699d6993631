# make install | demo | test | lint | bench | chaos | audit | clean

# The first Python that is new enough and can make a virtual environment; `make PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint format bench chaos audit clean
.DEFAULT_GOAL := help

help:
	@echo "make install  a virtual environment in $(VENV), with the command orchestrate in it"
	@echo "make demo     install, then a sweep over the bundled study"
	@echo "make test     install, then all tests"
	@echo "make lint     Ruff (lint and format) and mypy"
	@echo "make format   Ruff's fixes and format, in place"
	@echo "make bench    what the store, the training step, observation and the platform cost beyond the work itself, and what sharing saves"
	@echo "make chaos    the tests that kill processes and damage files"
	@echo "make audit    known vulnerabilities in the pinned versions (asks a public database)"
	@echo "make clean    remove $(VENV) and caches; results and stages stay"

install: $(STAMP)

# Touched last, so an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv was found; install one, or give it: make PYTHON=/path/to/python" >&2; exit 2; }
	@echo "Installing into $(VENV): about 150 packages, 2 GB; a minute or two on a fast network."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

demo: install
	$(BIN)/orchestrate sweep

# Last, so that pytest's closing line is the last line.
test: install
	@$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/observe.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/sharing.py

chaos: install
	@$(BIN)/python -m pytest -m chaos

# In an environment of its own: the auditor's dependencies aren't the project's. Strict: a package that the database
# does not know, or a database out of reach, is a failure, not a pass.
audit: install
	$(BIN)/python -m pip check
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check "pip-audit>=2.7,<3"
	$(VENV)/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
