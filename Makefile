# make run      install and run the main job: keep, cluster and route the bundled experts
# make test     install and run the tests
# make check    format, lint, types
# make bench    the benchmarks (minutes)
# make fmt      put the code into its format

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?= Name the intent of the request.\nInput: my card was declined at the shop, what now?\nAnswer:

# Without an NVIDIA GPU, torch is held to a release that has a CPU build; see README, "Install".
GPU  := $(wildcard /proc/driver/nvidia/version /dev/nvidia0)
PINS := $(if $(GPU),,-c requirements/cpu.txt)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test check bench fmt clean

run: $(VENV)/.run
	$(BIN)/adaptlib init .adaptlib --demo
	$(BIN)/adaptlib list
	$(BIN)/adaptlib cluster
	$(BIN)/adaptlib route --prompt "$$(printf '$(PROMPT)')" --explain --generate

test: $(VENV)/.test
	$(BIN)/python -m pytest -q

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.test
	$(BIN)/python benchmarks/cli.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/routing.py

fmt: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "adaptlib needs Python 3.11 or later; say which: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml requirements/cpu.txt | $(BIN)/python
	$(BIN)/pip install -q $(PINS) -e .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(BIN)/pip install -q $(PINS) -e '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/pip install -q $(PINS) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .adaptlib build *.egg-info
