# Two commands do all the set-up on a machine with Python 3.11+, pip and make:
#   make demo   makes .venv, installs, and runs the main job on a rendered screen
#   make test   installs the test extra, lints, type-checks, and runs the tests

PYTHON ?= python3
VENV ?= .venv
CORE ?= .venv-core
BIN := $(VENV)/bin
SOURCES := cellstore cli migrations tests docs $(wildcard benchmarks)

PACKAGED := $(shell find cellstore cli migrations -type f -not -name '*.pyc')

.PHONY: help demo test lint types layers schema tests core-check docs clean

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/cellstore demo

test: lint types layers schema tests

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	touch $@

$(VENV)/.test: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

lint: $(VENV)/.test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.test
	$(BIN)/mypy cellstore cli migrations

layers: $(VENV)/.test
	$(BIN)/lint-imports

# The models and the migrations say the same, on a database made just now.
schema: $(VENV)/.test
	rm -f $(VENV)/schema.db
	$(BIN)/alembic -x url=sqlite:///$(VENV)/schema.db upgrade head
	$(BIN)/alembic -x url=sqlite:///$(VENV)/schema.db check

# A process per core, each with one thread; worksteal keeps the tests of a file mostly together.
tests: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
		$(PYTEST_OPTIONS)

# The core alone, as `pip install cellstore` gives it: no torch, and the basic commands work.
core-check: $(CORE)/.installed
	sh .ci/core-check $(CORE)

$(CORE)/.python:
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install --quiet --upgrade pip
	touch $@

$(CORE)/.installed: $(CORE)/.python pyproject.toml $(PACKAGED)
	rm -rf build
	$(CORE)/bin/python -m pip install --quiet --force-reinstall --no-deps .
	$(CORE)/bin/python -m pip install --quiet .
	touch $@

# docs/commands.md is made from the commands' own help.
docs: $(VENV)/.installed
	$(BIN)/python docs/make_commands.py

clean:
	rm -rf $(VENV) $(CORE) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
