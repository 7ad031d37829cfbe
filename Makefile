# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# CONSTRAINTS= (empty) installs the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
PIP_CONSTRAINTS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: help install demo test test-slow test-gpu test-cluster image-test soak lint format clean

help:
	@echo "make demo      prepare 5,000 molecules, pretrain a tiny model on 2 ranks, export it, embed molecules"
	@echo "make test      lint, types and the whole test suite"
	@echo "make test-slow the heavier matrices (layouts, real molecules), up to an hour on two cores"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make test-cluster two hosts over ssh and a two-node Slurm, in namespaces of this machine (root)"
	@echo "make image-test the CPU image, built and used without a Docker engine, about ten minutes (root)"
	@echo "make soak      a run that is killed again and again, up to 20 minutes"
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

clean:
	rm -rf build demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
