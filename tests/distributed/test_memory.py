"""What a run is refused for, against what real runs take: never more than that."""

import os
import subprocess
import sys

import pytest

from hmoe_ds.config import ConfigError
from hmoe_ds.config_parser import load_config
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.training.checks.disk_check import checkpoint_bytes
from hmoe_ds.training.checks.memory_check import check_memory
from hmoe_ds.training.launching.node import free_port
from hmoe_ds.training.machine import Machine
from tests.distributed.harness import ROOT

# In between, as a process counts what the one had that started it, and one that runs tests has gigabytes.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
LARGE = {"model.hidden_size": 384, "model.dense_size": 768, "router.experts": 32, "router.expert_size": 768}
FULL = {"data.molecules_per_step": 1024, "data.atoms_per_step": 65536, "data.bonds_per_step": 65536}
RUNS = {
    "parameters": LARGE | {"data.molecules_per_step": 32},
    "parameters, stage 2": LARGE | {"data.molecules_per_step": 32, "parallel.zero_stage": 2},
    "parameters, bf16": LARGE | {"data.molecules_per_step": 32, "parallel.precision": "bf16"},
    "activations": FULL | {"model.lower_blocks": 6, "model.dense_size": 512},
    "activations, recomputed": FULL | {"model.lower_blocks": 6, "parallel.activation_checkpointing": "true"},
}


@pytest.mark.parametrize(
    "name", [name if name == "parameters, bf16" else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_a_run_that_had_enough_would_not_have_been_refused(name, dataset, tmp_path):
    settings = RUNS[name] | {"data.path": dataset, "run.out": tmp_path / "run", "run.steps": 2, "run.mlflow": "false"}
    words = ["--config=tiny_cpu", *(f"--{key}={value}" for key, value in settings.items())]
    peak = peak_bytes(words)
    config = load_config(words)
    atoms, bonds = open_mixture(config.data, "train").mean_size()
    check_memory(config, 1, atoms, bonds, Machine(1, peak))
    with pytest.raises(ConfigError, match="this run needs about"):
        check_memory(config, 1, atoms, bonds, Machine(1, peak / 16))
    written = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file())
    assert checkpoint_bytes(config) <= written <= 1.5 * checkpoint_bytes(config)


def peak_bytes(words: list[str]) -> int:
    """Train on one rank; -> the most memory that its process had."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **alone, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "hmoe_ds.training.loop", *words]
    return 1024 * int(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
