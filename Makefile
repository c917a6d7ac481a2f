# make run      install, then the main job: keep, cluster and route the bundled experts
#               with your own words: make run PROMPT="..." INSTRUCTION="..."
# make test     install, then the tests
# make check    format, lint, types
# make bench    the benchmarks (minutes)
# make soak     the long versions of the store's tests (an hour); figures in soak.jsonl
# make fuzz     a million mutated headers and configs
# make fmt      put the code into its format

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

export INSTRUCTION ?= Is the first name female or male?
export PROMPT      ?= Elizabeth

# Without an NVIDIA GPU, torch is held to a release that has a CPU build; see README, "Install".
GPU  := $(wildcard /proc/driver/nvidia/version /dev/nvidia0)
PINS := $(if $(GPU),,-c requirements/cpu.txt)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test check bench soak fuzz fmt clean

run: $(VENV)/.run
	@echo; echo '$$ adaptlib init --demo'
	@$(BIN)/adaptlib init .adaptlib --demo
	@echo; echo '$$ adaptlib list'
	@$(BIN)/adaptlib list -L .adaptlib
	@echo; echo '$$ adaptlib cluster'
	@$(BIN)/adaptlib cluster -L .adaptlib
	@echo; echo "$$ adaptlib route --instruction '$$INSTRUCTION' --prompt '$$PROMPT' --explain --generate"
	@$(BIN)/adaptlib route -L .adaptlib --instruction "$$INSTRUCTION" --prompt "$$PROMPT" \
	  --explain --generate

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.test
	$(BIN)/python benchmarks/cli.py
	$(BIN)/python benchmarks/store.py
	$(BIN)/python benchmarks/prototypes.py
	$(BIN)/python benchmarks/clustering.py --experts 1000
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/train_library.py
	$(BIN)/python benchmarks/routing.py
	$(BIN)/python benchmarks/merging.py

SOAK ?= 20

soak: $(VENV)/.test
	rm -f soak.jsonl
	OMP_NUM_THREADS=1 ADAPTLIB_SOAK=$(SOAK) ADAPTLIB_SOAK_REPORT=$(CURDIR)/soak.jsonl \
	  $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/store tests/hostile \
	  tests/experts/test_corruption.py tests/experts/test_library_faults.py tests/cli/test_faults.py
	$(MAKE) fuzz

fuzz: $(VENV)/.test
	$(BIN)/python tests/hostile/fuzz_header.py --inputs 1000000

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
