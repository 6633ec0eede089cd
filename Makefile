# make train   set up everything, then train the quickstart recipe
# make test    set up everything, then run the tests, in two processes; make test-all adds the rest of the large grids
# Both work on a fresh Debian or Ubuntu machine, and without root anywhere that pip installs PyTorch: FFCV is then left
# out. What is set up already is not set up again.

PYTHON ?= python3
VENV   ?= .venv
READY  := $(VENV)/.ready
BIN    := $(VENV)/bin

.PHONY: train test test-all lint bench bench-train compile-report gpu-check setup clean
.DEFAULT_GOAL := train

train: $(READY)
	$(BIN)/python -m rsengine.train --or-digits $(ARGS)

# Two processes share the cores. A file's tests stay in one, which has its fixtures and compiled kernels. Threads that
# wait for each other sleep: by default they spin, on a core that the other process needs.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest \
          -n 2 --dist loadfile --no-loadscope-reorder -p tests.longest_first

test: $(READY)
	$(PYTEST) -m 'not slow_grid and not thorough' $(ARGS)

test-all: $(READY)
	$(PYTEST) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

bench-train: $(READY)
	$(BIN)/python -m pytest bench/test_train_step.py -k beside_baselines --benchmark-only --benchmark-json=.benchmarks/train-step.json -s $(ARGS)
	$(BIN)/python -m bench.train_step_table .benchmarks/train-step.json

compile-report: $(READY)
	$(BIN)/python -m rsengine.kernels.proof.compile_report $(ARGS)

gpu-check: $(READY)
	$(BIN)/python -m rsengine.gpu_check $(ARGS)

setup: $(READY)

$(READY): setup.py constraints.txt scripts/setup.sh
	sh scripts/setup.sh $(PYTHON) $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
