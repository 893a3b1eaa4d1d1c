# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= outputs
PEERS := .venv-peers
REPEATS ?= 5

.PHONY: install demo test test-all bench bench-peers lint clean

install: $(VENV)/.installed

# One pinned pip command: torch comes with the rest, so that no other build of it is drawn in.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python scripts/demo.py

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not gpu"

test-all: install lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not gpu"

# What lmlab is compared with gets an environment of its own; one pinned pip command, as above.
bench-peers: $(PEERS)/.installed

$(PEERS)/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# All CPU suites, hours on 2 cores; REPEATS=1 for a trial, SUITES=finetune,startup for some of them.
bench: install bench-peers
	$(BIN)/python benchmarks/run_all.py --repeats $(REPEATS) $(if $(SUITES),--suites $(SUITES))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(PEERS) build dist .pytest_cache .ruff_cache
