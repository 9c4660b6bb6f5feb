PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast constraints test-gpu test-slurm bench-gpu tensorboard clean-quickstart

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(BIN)/.installed  ## set up, train a tiny teacher on made-up stories, distil it into GLA, compare the two (CPU, minutes)
	$(BIN)/python experiments/quickstart.py
	$(BIN)/distill-pl fit --config experiments/quickstart_teacher.yaml
	$(BIN)/distill-pl fit --config experiments/quickstart.yaml
	$(BIN)/distill-pl evaluate runs/quickstart/gla
	@echo; echo "the teacher writes:"
	@$(BIN)/distill-pl generate runs/quickstart/teacher --prompt "Once there was a" --max_new_tokens 120 --temperature 0.7
	@echo; echo "the student writes:"
	@$(BIN)/distill-pl generate runs/quickstart/gla --prompt "Once there was a" --max_new_tokens 120 --temperature 0.7

clean-quickstart:  ## delete the quickstart's runs, so that it starts over
	rm -rf runs/quickstart

test: $(BIN)/.installed  ## set up, then check style (ruff) and types (mypy) and run all tests (pytest)
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test-fast: $(BIN)/.installed  ## set up and run the tests that take about a second or less each (one to two minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow and not slurm"

test-gpu: $(BIN)/.installed  ## on a GPU: compare kernels with their mixing matrices, and compiled steps with plain ones
	$(BIN)/python -m pytest -q tests/gpu

test-slurm: $(BIN)/.installed  ## test the batch scripts on a local Slurm (apt install slurmctld slurmd slurm-client munge)
	$(BIN)/python -m pytest -q -m slurm tests/run/test_slurm.py

bench-gpu: $(BIN)/.installed  ## on a GPU: measure every mixer's op, every stage's step, start-up and generation
	$(BIN)/python benchmarks/startup.py
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/distill-pl bench gla mlstm softmax

constraints:  ## write the newest versions of all packages to constraints.txt; then run make test
	rm -rf .venv && $(PYTHON) -m venv .venv && $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@sed -n '/^#/p' constraints.txt > constraints.new
	@$(BIN)/pip freeze --exclude-editable --exclude triton | sed -E 's/[+][^ ]*//; s/$$/ ; python_version >= "3.11"/' >> constraints.new
	@mv constraints.new constraints.txt

tensorboard: $(BIN)/.installed  ## show the curves of all runs
	$(BIN)/tensorboard --logdir runs
