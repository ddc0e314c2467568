# Everything runs from .venv, which the first target makes. Needed beforehand: Python >= 3.11 and make.
SUPPORTED = -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python $(SUPPORTED) 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

DEMO_PROMPT ?= a large plain red circle moving right over a gray gradient
DEMO_OUT ?= outputs/demo

.PHONY: help install demo test check table clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    dense against sparse on the shipped model: videos and numbers in $(DEMO_OUT)"
	@echo "make test    the tests"
	@echo "make check   ruff, mypy, import-linter"
	@echo "make table   the tables of README and docs from the rows in eval/results"
	@echo "make clean   remove .venv, caches and build output"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "needs Python >= 3.11 with venv: install it or call make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/sparse-dit compare --model tiny-wan --prompt "$(DEMO_PROMPT)" --out "$(DEMO_OUT)"

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

table: $(INSTALLED)
	$(BIN)/python -m sparse_dit.eval.report
	$(BIN)/python -m sparse_dit.eval.tables

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
