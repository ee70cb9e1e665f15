# `make demo`, `make test` and `make check` work from a fresh clone on a machine with Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin
# In the environment, so that what pip installs to build the package is held to the pins as well.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet \
	--disable-pip-version-check
EXTRAS := blackbox,cifar,flows,hf,graphs,tensorboard,test,docs
# The one place where the version of PyTorch is chosen; `make lock` carries it to constraints.txt.
TORCH := 2.13.0
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test check docs wheel bench lock clean

demo: .venv/demo
	$(BIN)/netwright compare

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/python tools/stubs.py
	$(BIN)/mypy
	$(BIN)/deptry netwright
	$(BIN)/deptry tests benchmarks docs evidence tools --ignore DEP002,DEP004
	$(PYTEST) -m 'not check'

# What takes long: the site, the wheel, a browser, a database.
check: .venv/test
	$(PYTEST) -m check

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: .venv/test
	$(BIN)/python -m build --wheel

bench: .venv/test
	$(BIN)/python -m pytest benchmarks

# Write constraints.txt anew: the newest releases that pyproject.toml allows, and all they need.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==$(TORCH) editables -e '.[$(EXTRAS)]'  # editables: hatchling asks for it
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude netwright > build/lock/pins
	{ printf '%s\n' '# All that `make demo`, `make test` and `make check` install; written by `make lock`.' \
		'# PyTorch is the CPU build: a plain `pip install torch` may pull gigabytes of CUDA.'; \
		sed 's/+.*//' build/lock/pins | LC_ALL=C sort -f; } > constraints.txt

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[$(EXTRAS)]'
	touch $@ .venv/demo

.venv/docs: .venv/test
	touch $@

clean:
	rm -rf .venv build dist site runs
