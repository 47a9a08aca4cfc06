# Two commands: `make demo` and `make test`. Both set up what they need in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The older reviewed release of SGLang, with the torch that it pins.
OLDER := .venv-0.5.17
NEWEST_NEEDS := '.[engine,dev]'
OLDER_NEEDS := '.[dev]' sglang==0.5.17
TRAINING_NEEDS := '.[sae,monitor,ray]'
# Tests that start engines stay in one worker (tests/conftest.py); the rest runs beside them.
WORKERS := -n 2 --dist loadscope --no-loadscope-reorder
# Compiled bytecode of SGLang's seven thousand modules, kept out of the source trees: starts are twice as fast with it.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS ?= 1
# The reference platform, on a machine with a GPU as well. `make demo SGLANG_PROBE_DEVICE=` leaves the choice to SGLang.
export SGLANG_PROBE_DEVICE ?= cpu

.PHONY: demo demo-real test test-all attack soak bench bench-peers bench-gpu wheel docs lint setup clean

demo: setup ## run the paired harvest on real SGLang and write runs/cache-on-off/report.html
	$(BIN)/sglang-probe ab experiments/cache-on-off.yaml --overwrite
	$(BIN)/sglang-probe verify runs/cache-on-off/cache_off --transformers 8

demo-real: setup ## the same with a language model of 135 million parameters (fetched once, 93 MB)
	$(BIN)/sglang-probe model fetch smollm2-135m
	$(BIN)/sglang-probe ab experiments/demo-real.yaml --overwrite
	$(BIN)/sglang-probe verify runs/demo-real/cache_off --transformers 4

test: setup ## tests, a few minutes on two cores
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-all: setup $(VENV)/.sae $(OLDER)/.ready ## slow tests too, training of SAEs, and everything on the older release of SGLang
	$(BIN)/python -m pytest $(WORKERS)
	$(OLDER)/bin/python -m pytest $(WORKERS)

attack: setup ## random traffic, steered and plain, against itself alone; then in 60 random configurations against the true owner of every KV slot; half an hour; the second part is resumable
	$(BIN)/python -m tests.attack.steering
	$(BIN)/python -m tests.attack.sweep --out runs/attack --document docs/evidence/attack.md

soak: setup ## an hour of harvests and servers that are killed, whose disks fail and whose clocks are set; resumable
	$(BIN)/python -m tests.attack.soak --out runs/soak --hours 1 --document docs/evidence/soak.md

bench: setup ## measure overhead and studies, and write docs/evidence/benchmarks.md
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/eviction.py --out docs/evidence/benchmarks.md
	$(BIN)/python bench/coverage.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/monitor.py --out docs/evidence/benchmarks.md

bench-peers: setup ## harvest the same rows by sglang-probe, hooks, SAELens, nnsight and interp-engine, and write docs/evidence/peers.md
	$(BIN)/python bench/peers/run.py --model probe-text --rounds 5

bench-gpu: export SGLANG_PROBE_DEVICE :=
bench-gpu: setup ## on a machine with an NVIDIA GPU: what docs/explanation/gpu.md says has not been shown yet; resumable
	$(BIN)/python bench/gpu.py

wheel: setup ## build dist/sglang_probe-*.whl, for an environment that has its own SGLang
	$(BIN)/python -m uv build --wheel --out-dir dist .

docs: setup ## write the pages of docs/reference that follow from the code
	$(BIN)/python docs/generate.py

lint: setup
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy

setup: $(VENV)/.ready

# uv goes into the virtual environment, because a system Python may refuse packages (PEP 668).
define install # environment, constraints, what
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; make PYTHON=python3.12")'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(1)/bin/python -m ensurepip --upgrade >/dev/null
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(1)/bin/python -m uv pip install --python $(1)/bin/python --constraint $(2) --editable $(3)
	@touch $@
endef

$(VENV)/.ready: pyproject.toml constraints/0.5.23.txt
	$(call install,$(VENV),constraints/0.5.23.txt,$(NEWEST_NEEDS))

# SAELens and what it brings: 42 packages, 190 MB, that tests of training need and nothing else does. And river: ADWIN;
# and Ray, 200 MB: replicas.
$(VENV)/.sae: $(VENV)/.ready
	$(call install,$(VENV),constraints/0.5.23.txt,$(TRAINING_NEEDS))

$(OLDER)/.ready: pyproject.toml constraints/0.5.17.txt
	$(call install,$(OLDER),constraints/0.5.17.txt,$(OLDER_NEEDS))

clean:
	rm -rf $(VENV) $(OLDER) .cache runs
