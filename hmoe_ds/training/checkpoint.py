"""Save and restore a run: DeepSpeed's model and optimizer files, and our own state beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed

from hmoe_ds.config import ConfigError, RunConfig, save_config


@dataclass
class TrainState:
    """What a run needs to go on, beside what the engine holds.

    Args:
        step: optimizer steps done.
        plan: state of the batch plan.
        mlflow_run_id: the MLflow run to continue.
    """

    step: int
    plan: dict[str, int]
    mlflow_run_id: str | None


def checkpoint_dir(config: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.run.out) / "checkpoints"


def has_checkpoint(config: RunConfig) -> bool:
    """Whether there is one to resume from."""
    return (checkpoint_dir(config) / "latest").is_file()


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, config: RunConfig, state: TrainState, dataset: str) -> None:
    """Write checkpoint `step<N>` and make it the latest; all ranks take part.

    Args:
        engine: model and optimizer.
        config: kept inside, so that a checkpoint can be exported on its own.
        state: kept inside.
        dataset: fingerprint of the training data, kept inside.
    """
    client_state = {"hmoe_ds": {**asdict(state), "config": config.to_dict(), "dataset": dataset}}
    tag = f"step{state.step:08d}"
    engine.save_checkpoint(str(checkpoint_dir(config)), tag=tag, client_state=client_state)


def load_checkpoint(engine: deepspeed.DeepSpeedEngine, config: RunConfig, dataset: str) -> TrainState:
    """Restore the latest checkpoint into `engine`; all ranks take part.

    Raises:
        ConfigError: the checkpoint is of another model, topology or dataset.
    """
    _, client_state = engine.load_checkpoint(str(checkpoint_dir(config)))
    saved = client_state["hmoe_ds"]
    if saved["dataset"] != dataset:
        raise ConfigError(
            f"checkpoint in {checkpoint_dir(config)} was trained on another dataset than data.path "
            f"{config.data.path}: give the original dataset, or another run.out"
        )
    return TrainState(step=saved["step"], plan=saved["plan"], mlflow_run_id=saved["mlflow_run_id"])


def check_resumable(config: RunConfig, ranks: int) -> None:
    """Raise ConfigError when `run.out` holds a run that `config` on `ranks` ranks cannot continue."""
    if not has_checkpoint(config):
        return
    if config.run.resume == "never":
        raise ConfigError(
            f"run.out {config.run.out} already holds a run with checkpoints and run.resume is never: "
            "set run.resume to auto, or give another run.out"
        )
    saved = json.loads((Path(config.run.out) / "run.json").read_text())
    if saved["ranks"] != ranks:
        raise ConfigError(
            f"run.out {config.run.out} was trained on {saved['ranks']} ranks, this start has {ranks}: "
            f"start {saved['ranks']} ranks, or give another run.out"
        )
    now = config.to_dict()
    for section, name in _changes(saved["config"], now):
        if (section, name) not in _FREE_ON_RESUME:
            raise ConfigError(
                f"{section}.{name} is {now[section][name]!r}, but the run in {config.run.out} has "
                f"{saved['config'][section][name]!r}: set it back, or give another run.out"
            )


# What may change between the parts of one run without making it another run.
_FREE_ON_RESUME = {
    ("run", name) for name in ("out", "steps", "resume", "log_every", "validate_every", "checkpoint_every", "mlflow")
} | {("data", "path"), ("data", "validation_molecules")}


def begin_run(config: RunConfig, ranks: int) -> None:
    """Make the run's folder and note in it what the run is: `config.yaml` to read, `run.json` for `check_resumable`."""
    out = Path(config.run.out)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    (out / "run.json").write_text(json.dumps({"ranks": ranks, "config": config.to_dict()}, indent=2) + "\n")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (section, name)
        for section, values in now.items()
        for name, value in values.items()
        if before.get(section, {}).get(name) != value
    ]
