# `make demo` and `make test` work from a fresh clone on a machine with Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test lint types docs wheel bench clean

demo: .venv/demo
	$(BIN)/netwright compare

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/python tools/stubs.py
	$(BIN)/mypy
	$(THREADS) $(BIN)/python -m pytest -n 2 --dist worksteal

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: .venv/test
	$(BIN)/python -m build --wheel

bench: .venv/test
	$(BIN)/python -m pytest benchmarks

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[blackbox,cifar,flows,hf,graphs,tensorboard,test,docs]'
	touch $@ .venv/demo

.venv/docs: .venv/test
	touch $@

clean:
	rm -rf .venv build dist site runs
