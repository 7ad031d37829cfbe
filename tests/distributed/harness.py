"""Run the training loop on several ranks as real processes, without a launcher."""

import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from hmoe_ds.training.launching.node import free_port
from tests.distributed.ranks_job import Job

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300
# Figures in a line of metrics that tell the time, and so differ from run to run.
TIMED = ("time", "molecules_per_second", "flops_per_second", "data_wait", "exchange_share", "host_memory_bytes")


def run_module(module: str, ranks: int, arguments: list[str], timeout: float = TIMEOUT_SECONDS) -> None:
    """Run `python -m module arguments` once per rank; when one fails or the time is up, all are ended."""
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        code = _starter().run(Job(module, arguments, ranks, {**os.environ, **meeting}, folder), timeout)
        logs = "\n".join(f"{log.name}:\n{log.read_text()[-4000:]}" for log in sorted(Path(folder).iterdir()))
    failed = f"not done in {timeout} s" if code is None else f"exit code {code}"
    assert code == 0, f"{module}: {failed}\n{logs}"


class _Starter:
    """A process from which ranks are forked (`ranks`). It ends with this one, when its standard input is closed."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.distributed.ranks"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, job: Job, timeout: float) -> int | None:
        """-> the exit code, None if the time was up. All processes of the job are then gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job._asdict()) + "\n")
        self._process.stdin.flush()
        group = self._answer()
        in_time = bool(select.select([self._process.stdout], [], [], timeout)[0])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        code = self._answer()
        return code if in_time else None

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@functools.cache
def _starter() -> _Starter:
    return _Starter()


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
