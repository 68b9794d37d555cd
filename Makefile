# Everything runs in .venv, made from requirements.lock. PYTHON=python3.12 make setup chooses the interpreter.
PYTHON ?= python3
ARGS ?= experiment=start
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
TWO := -n 2 --dist loadfile # tests of two files at the same time

.PHONY: help setup run test slurm gpu check report clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with the pinned packages; again only when they change

# --no-deps for recombine itself: the lock is complete, and nothing may move its versions
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
		{ echo "$(PYTHON) not found: install Python 3.11 or newer, or make PYTHON=/path/to/it"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed, make PYTHON=/path/to/it"; exit 1; }
	@echo "setting up $(VENV): minutes, once"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

run: setup ## the packaged model, then python run.py $(ARGS): ARGS="method=lora ..." runs something else
	$(BIN)/python -W ignore::RuntimeWarning -m recombine.runtime.assets dinov2_s14
	$(BIN)/python run.py $(ARGS)

test: setup ## the default tests
	$(BIN)/python -m pytest $(TWO)

slurm: setup ## tests on a real Slurm of this machine: sudo scripts/local_slurm.sh install first
	$(BIN)/python -m pytest -m slurm -rs

gpu: setup ## on a machine with a GPU: the gpu tests and the papers' tables, into experiments/gpu; ARGS=--dry: on a CPU
	$(BIN)/python scripts/gpu_report.py $(if $(filter command%,$(origin ARGS)),$(ARGS))

check: setup ## what CI runs: lint, format, tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest $(TWO)

report: setup ## one page over all results: outputs/report.html
	$(BIN)/python -m recombine.report --page

clean: ## removes .venv and the tools' caches; keeps results and the download cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
