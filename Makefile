# Developer commands. Everything runs in a virtual environment of the project's own.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup fmt lint test demo bench bench-smoke gpu schema check clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile
	$(MAKE) bench-smoke

demo: setup
	$(BIN)/hps-numba demo --output demo-output

bench: setup
	$(BIN)/python -m bench
	$(BIN)/python -m bench.report
	$(BIN)/python -m pytest bench --benchmark-autosave

bench-smoke: setup
	$(BIN)/python -m bench --smoke
	$(BIN)/python -m pytest bench --smoke --benchmark-disable

# On a machine with a GPU, by its own Python: nothing is installed.
gpu:
	$(PYTHON) -m bench.gpu $(GPU_FLAGS)

schema: setup
	$(BIN)/python -m hps_numba.config docs

check: lint test

clean:
	rm -rf $(VENV) build demo-output *.egg-info
