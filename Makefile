# `make demo`, `make compare`, `make test` and `make check` work from a fresh clone on a machine with Python 3.11.
PYTHON ?= python3.11
BIN := .venv/bin
# In the environment, so that what pip installs to build the package is held to the pins as well.
INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet \
	--disable-pip-version-check
EXTRAS := blackbox,cifar,flows,hf,graphs,lightning,onnx,tensorboard,test,docs
# The one place where the version of PyTorch is chosen; `make lock` carries it to constraints.txt.
TORCH := 2.13.0
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: demo compare test check docs wheel bench lock newest oldest build/newest build/oldest clean

# Train a small network, and find what makes it smaller.
demo: .venv/demo
	$(BIN)/netwright demo

compare: .venv/demo
	$(BIN)/netwright compare

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/python tools/stubs.py
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry netwright
	$(BIN)/deptry tests benchmarks docs evidence tools --ignore DEP002,DEP004
	$(THREADS) $(BIN)/python $(PYTEST) -m 'not check'

# What takes long: the site, the wheel, a browser, a database.
check: .venv/test
	$(THREADS) $(BIN)/python $(PYTEST) -m check

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: .venv/test
	$(BIN)/python -m build --wheel

bench: .venv/test
	$(BIN)/python -m pytest benchmarks

# Write constraints.txt anew from the newest releases.
lock: build/newest
	build/newest/bin/python -m pip freeze --all --exclude pip --exclude netwright > build/newest/pins
	{ printf '%s\n' '# All that `make demo`, `make test` and `make check` install; written by `make lock`.' \
		'# PyTorch is the CPU build: a plain `pip install torch` may pull gigabytes of CUDA.'; \
		sed 's/+.*//' build/newest/pins | LC_ALL=C sort -f; } > constraints.txt

# The tests with the newest releases, and with the lower ends of the ranges of pyproject.toml. Both
# are run by hand, after `make lock` or a change of a range, and noted in the changelog.
newest: build/newest
	$(THREADS) build/newest/bin/python $(PYTEST) -m 'not check'

oldest: build/oldest
	$(THREADS) build/oldest/bin/python $(PYTEST) -m 'not check'

# The newest releases that pyproject.toml allows, with the one PyTorch; hatchling asks for editables.
build/newest:
	rm -rf $@
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==$(TORCH) editables -e '.[$(EXTRAS)]'

build/oldest:
	rm -rf $@
	$(PYTHON) -m venv $@
	$(PYTHON) tools/oldest.py > $@/pins
	PIP_CONSTRAINT=$@/pins $@/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[$(EXTRAS)]'

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
