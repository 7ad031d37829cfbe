# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# CONSTRAINTS= (empty) installs the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
PIP_CONSTRAINTS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help install demo test test-slow test-gpu test-cluster image-test soak bench docs lint format clean

help:
	@echo "make demo      prepare 5,000 molecules, pretrain a tiny model on 2 ranks, export it, embed molecules"
	@echo "make test      lint, types and the whole test suite"
	@echo "make test-slow the heavier matrices (layouts, real molecules), up to an hour on two cores"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-cluster two hosts over ssh and a two-node Slurm, in namespaces of this machine (root)"
	@echo "make image-test the CPU image, built and used without a Docker engine, about ten minutes (root)"
	@echo "make soak      a run that is killed again and again, up to 20 minutes"
	@echo "make bench     the CPU benchmarks; DATA=DIR and SOURCES='FILE...' for those that need molecules; hours with all"
	@echo "make docs      the documentation, as a site in docs/_build/html"
	@echo "make lint      ruff, mypy and hadolint"
	@echo "make format    ruff format"

install: $(STAMP)

# Torch comes first and alone: what follows then keeps the build that is there.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_CONSTRAINTS) torch numpy setuptools wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation $(PIP_CONSTRAINTS) -e ".[train,dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(PIP_CONSTRAINTS) ogb
	touch $(STAMP)

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" bash launchers/demo.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Three test files at a time, as tests that start, kill and await processes leave two cores idle half of the time. In the
# order of their names, as the many short ones of tests/unit then fill the end.
test: lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/cluster

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Machines in namespaces. Needs root and, as packages of Debian: pdsh openssh-server openmpi-bin slurm-wlm munge iproute2
test-cluster: $(STAMP)
	$(BIN)/python -m pytest tests/cluster

# A tiny run, killed at random moments and at every operation on its files.
soak: $(STAMP)
	$(BIN)/python -m tests.faults.soak

test-gpu: $(STAMP)
	HMOE_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu

# The virtual environment only says where pip takes packages from.
image-test: $(STAMP)
	PYTHON="$(abspath $(BIN))/python" bash tests/image/run.sh

# One after the other, at their default sizes; each prints a JSON line and replaces its file in docs/results.
# Not here: gpu (needs a CUDA device), ablation (needs labelled tables, takes hours), novelty (needs a model pretrained on
# a dataset), recorded_routing (makes the choices that moe_layer replays). docs/RESULTS.md has their commands.
BENCH := moe_layer prepare_memory prepare_synth
BENCH_DATA := loader peer_step gate_arms migration scaling_model
BENCH_SOURCES := prepare standardize prepare_workers
# A dataset made by hmoe prepare, and molecule files.
DATA ?=
SOURCES ?=
# Those that pretrain keep their runs.
bench/gate_arms bench/migration bench/scaling_model: BENCH_OUT = --out runs/bench/$(@F)
# Torch asks for huge pages, as in hmoe pretrain on a CPU.
bench/peer_step: export THP_MEM_ALLOC_ENABLE = 1

.PHONY: $(addprefix bench/,$(BENCH) $(BENCH_DATA) $(BENCH_SOURCES))
.NOTPARALLEL: bench
bench: $(addprefix bench/,$(BENCH) $(BENCH_DATA) $(BENCH_SOURCES))

$(addprefix bench/,$(BENCH)): $(STAMP)
	$(BIN)/python -m benchmarks.$(@F)

$(addprefix bench/,$(BENCH_DATA)): $(STAMP)
	$(if $(DATA),$(BIN)/python -m benchmarks.$(@F) --data $(DATA) $(BENCH_OUT),@echo "$(@F): skipped; give it a dataset: make bench DATA=DIR")

$(addprefix bench/,$(BENCH_SOURCES)): $(STAMP)
	$(if $(SOURCES),$(BIN)/python -m benchmarks.$(@F) $(SOURCES),@echo "$(@F): skipped; give it molecule files: make bench SOURCES='zinc.smi.gz ...'")

# Warnings are errors. Needs no network.
docs: $(STAMP)
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf build demo docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
