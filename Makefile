# One door to everything: `make help` lists the targets. Each of them installs what it needs first.

PYTHON    ?= python3
TORCH     ?= torch==2.13.0
MARKS     ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,not gpu)
WORKERS   ?= auto
DEMO_ARGS ?= --model pocket --tasks needle --lengths 2048,4096 --samples 4 --json saccade-report.json --html saccade-report.html \
  --methods "dense;streaming-llm(window=508);snapkv(budget=0.25, window=64, kernel=31);quest(budget=0.25);zipcache"
BENCH_ARGS ?= attend --grid quick

VENV := .venv
BIN  := $(VENV)/bin
# one thread per test process: several processes that each start a thread pool slow each other down
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-gpu check bench clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## create .venv with torch, saccade and the development tools

# torch goes in first and is then pinned to what was installed, so that a chosen build (CPU, CUDA) is never replaced
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than Python 3.11: run make PYTHON=python3.11 (or newer)" >&2; exit 1; }
	@echo "installing $(TORCH) and saccade into $(VENV): a few minutes, once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/torch.txt --editable '.[dev,report]'
	@touch $@

demo: $(VENV)/.installed ## compare methods with dense attention on the model that ships with the package
	$(BIN)/saccade compare $(DEMO_ARGS)

test: $(VENV)/.installed ## run the fast tests
	$(PYTEST)

test-all: $(VENV)/.installed ## run every test (those for a GPU only where there is one)
	$(PYTEST) -m "$(MARKS)"

test-gpu: $(VENV)/.installed ## run the tests of the kernels on a GPU
	SACCADE_TEST_DEVICE=cuda $(PYTEST) -m "" tests/ops

check: $(VENV)/.installed ## lint and check types
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed ## time the kernels against the best dense ones
	$(BIN)/saccade bench $(BENCH_ARGS)

clean: ## remove build outputs and caches
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
