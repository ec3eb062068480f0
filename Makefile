# Everything runs in .venv, made by the first target that needs it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install quickstart check test clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Builds recipe `quickstart` (nothing, if it is built) and lets the artifact speak.
quickstart: install
	$(BIN)/doit build recipe=quickstart
	$(BIN)/furiosa-build generate artifacts/quickstart/latest --prompt "It is a truth universally acknowledged, that" --seed 4 --max-tokens 96

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: install
	$(BIN)/pytest -n auto

clean:
	rm -rf $(VENV) artifacts
