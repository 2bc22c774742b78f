# Everything a developer types. Each target makes its virtual environment when there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
export PYTHONDONTWRITEBYTECODE ?=

.PHONY: help quickstart test check bench gpu clean

help:  ## Show the targets.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch numpy
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/.base  ## Train a small hybrid model on two ranks, then let it write.
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m rondo.pretrain quickstart
	$(BIN)/rondo generate runs/quickstart --prompt "The function returns" --max_tokens 64
	@echo
	@echo "Curves:  $(BIN)/tensorboard --logdir runs/quickstart/tensorboard"

check: $(VENV)/.dev  ## Lint, types, import rules and the quick tests: about a minute.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 -m quick

test: $(VENV)/.dev  ## Tests that need no GPU; with RONDO_TESTS=all the slowest too.
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 --dist worksteal

bench: $(VENV)/.dev  ## Training speed on this CPU against Hugging Face's models, in one run.
	$(RUN) rondo.pretrain.bench

gpu:  ## GPU tests and benchmarks, with the interpreter at hand if its torch sees a GPU.
	@PYTHON=$(PYTHON) BIN=$(BIN) sh tests/gpu/run.sh

clean:  ## Remove the virtual environment and caches; runs/ and data/ stay.
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
