"""Run the training loop on several ranks as real processes, without a launcher."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_module(module: str, ranks: int, arguments: list[str], timeout: float = TIMEOUT_SECONDS) -> None:
    """Run `python -m module arguments` once per rank; when one fails or the time is up, all are ended."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            failed = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        assert failed is None, f"rank {failed} of {module} failed:\n{logs[failed or 0].read_text()[-4000:]}"


def _wait(processes: list[subprocess.Popen], timeout: float) -> int | None:
    """Wait for all ranks; -> the first one seen to fail, or the first one running when the time is up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if any(codes):
            return next(rank for rank, code in enumerate(codes) if code)
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)
    return next(rank for rank, process in enumerate(processes) if process.poll() is None)


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
    run_module("tests.distributed.run_all", ranks, [json.dumps(command_lines)], TIMEOUT_SECONDS + 30 * len(runs))
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
