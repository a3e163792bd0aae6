# make setup   create .venv and install torchslice with the tested versions (done by the others when needed)
# make demo    the whole story on the built-in digits data
# make test    all tests;  make test ARGS="tests/data -k digits"  some of them
# make benchmarks  the tests of the benchmarks, which are not part of the package
# make lint    formatting, lint and types
# make wheel   the wheel, installed without extras into a fresh environment, and its demo
# make ci      what the continuous integration runs: lint, both kinds of tests, the wheel

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test benchmarks lint wheel ci

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "torchslice needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/torchslice demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(ARGS)

benchmarks: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 benchmarks/tests $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(STAMP)
	.ci/wheel

ci:
	.ci/run
