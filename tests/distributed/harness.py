"""Run the training loop on several ranks as real processes, without a launcher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_module(module: str, ranks: int, arguments: list[str], expect_success: bool = True) -> list[str]:
    """Start `python -m module arguments` once per rank; -> what each rank printed.

    All ranks are ended when one fails or the time is up.
    """
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if expect_success:
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            assert process.returncode == 0, (
                f"rank {rank} of {module} ended with {process.returncode}:\n{output[-4000:]}"
            )
    return outputs


def train(out: Path, dataset: Path, ranks: int = 1, **overrides) -> list[dict]:
    """Pretrain a very small model; overrides are `section__field=value`. -> the lines of `metrics.jsonl`."""
    return train_all({out: overrides}, dataset, ranks)[out]


def train_all(runs: dict[Path, dict], dataset: Path, ranks: int) -> dict[Path, list[dict]]:
    """Several runs one after the other in the same processes, since importing DeepSpeed takes longer than a run.

    Args:
        runs: overrides of each run, by its folder.
        dataset: dataset directory.
        ranks: of every run.
    """
    command_lines = [arguments(out, dataset, **overrides) for out, overrides in runs.items()]
    run_module("tests.distributed.run_all", ranks, [json.dumps(command_lines)])
    return {out: read_metrics(out) for out in runs}


def arguments(out: Path, dataset: Path, **overrides) -> list[str]:
    """Command line of a very small run."""
    settings = SMALL | {"data.path": dataset, "run.out": out}
    settings |= {name.replace("__", "."): value for name, value in overrides.items()}
    return [f"--{name}={value}" for name, value in settings.items()]


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


SMALL = {
    "model.hidden_size": 16,
    "model.lower_blocks": 1,
    "model.upper_blocks": 2,
    "model.dense_size": 24,
    "router.groups": 4,
    "router.experts": 8,
    "router.experts_per_atom": 2,
    "router.expert_size": 16,
    "router.shared_size": 16,
    "router.gate_size": 8,
    "data.molecules_per_step": 32,
    "data.atoms_per_step": 4096,
    "data.bonds_per_step": 4096,
    "data.window_shards": 2,
    "data.validation_molecules": 64,
    "optim.learning_rate": 0.01,
    "optim.warmup_steps": 2,
    # Adam divides by the root of the second moment: a large epsilon keeps rounding noise in tiny gradients tiny.
    "optim.epsilon": 0.001,
    "run.steps": 4,
    "run.log_every": 1,
    "run.mlflow": "false",
}
