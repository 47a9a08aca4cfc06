# Two commands: `make demo` and `make test`. Both set up what they need in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled bytecode of SGLang's seven thousand modules, kept out of the source trees: starts are twice as fast with it.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all bench lint setup clean

demo: setup ## run the paired harvest on real SGLang and write runs/cache-on-off/report.html
	$(BIN)/sglang-probe ab experiments/cache-on-off.yaml --overwrite
	$(BIN)/sglang-probe verify runs/cache-on-off/cache_off --transformers 8

test: setup ## tests, a few minutes on two cores
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

test-all: setup ## slow tests too
	$(BIN)/python -m pytest

bench: setup ## measure the overhead and write docs/benchmarks.md
	$(BIN)/python bench/overhead.py

lint: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v uv >/dev/null || $(PYTHON) -m pip install --quiet uv
	@UV=$$(command -v uv || echo "$(PYTHON) -m uv"); \
	test -x $(BIN)/python || $$UV venv --python $$($(PYTHON) -c 'import sys; print(sys.executable)') $(VENV); \
	$$UV pip install --python $(BIN)/python --constraint constraints.txt --editable '.[engine,dev]'
	@touch $@

clean:
	rm -rf $(VENV) .cache runs
