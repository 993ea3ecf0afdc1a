# The two commands of the README. Both use one virtual environment, .venv, made on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test clean

test: .venv/ready
	$(BIN)/python -m pytest

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv
