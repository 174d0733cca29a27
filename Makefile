# Every target sets up what it needs: a virtual environment in .venv with the pinned dependencies.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help train sweep-report test test-gpu sanitize compile-oldest soak bench check fix clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

# A pip of 2023 would take half a minute longer to choose wheels, and any pip compiles on one core.
# What fails to compile is written for a newer Python; of transformers' many models hardly one is used.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python {v[0]}.{v[1]} is too old: 3.11 or newer is needed; name one with make PYTHON=...")'
	$(PYTHON) -m venv --upgrade-deps .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|pip|transformers/models)/' .venv/lib || true
	@touch $@

train: .venv/.installed ## train a small NSA model on the standard library's source text
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) OMP_WAIT_POLICY=PASSIVE $(BIN)/python train.py experiment=first_run

sweep-report: .venv/.installed ## draw a sweep's table and plot from its sweep.csv: SWEEP=folder, or the newest
	@$(BIN)/python -m runs.sweep_report $(SWEEP)

test: .venv/.installed ## run the tests that need no GPU
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: .venv/.installed ## run the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu

sanitize: .venv/.installed ## run a small case of every kernel under NVIDIA's compute-sanitizer (needs a GPU)
	for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 1 \
			$(BIN)/python tests/kernel_cases.py "100 tokens R3 D16" || exit 1; \
	done

compile-oldest: .venv/.installed ## compile every kernel with the oldest Triton that pyproject.toml allows
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .triton-oldest triton==3.6.0
	PYTHONPATH=.triton-oldest $(BIN)/python -m benchmarks.probes.compile_kernels --heads 64/4 --dim 128
	PYTHONPATH=.triton-oldest $(BIN)/python -m benchmarks.probes.compile_kernels --heads 8/4 --dim 64
	PYTHONPATH=.triton-oldest $(BIN)/python -m benchmarks.probes.compile_kernels --heads 64/4 --dim 192 --value-dim 128
	PYTHONPATH=.triton-oldest $(BIN)/python -m benchmarks.probes.compile_kernels --heads 64/4 --dim 128 --documents

soak: .venv/.installed ## kill a run twenty times at random moments and compare its weights
	$(BIN)/python tests/soak.py

bench: .venv/.installed ## time and measure the attention backends
	$(BIN)/python -m benchmarks.attention

check: .venv/.installed ## lint, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fix: .venv/.installed ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and the caches
	rm -rf .venv .triton-oldest .triton-cache .ruff_cache .pytest_cache
