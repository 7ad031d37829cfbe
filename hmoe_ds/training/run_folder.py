"""The folder of a run: what it is (`config.yaml`, `run.json`), where its checkpoints are, and who may continue it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hmoe_ds.config import ConfigError, RunConfig, save_config


def checkpoint_dir(config: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.run.out) / "checkpoints"


def has_checkpoint(config: RunConfig) -> bool:
    """Whether there is one to resume from."""
    return (checkpoint_dir(config) / "latest").is_file()


def check_resumable(config: RunConfig, ranks: int, dataset: str) -> None:
    """Raise ConfigError when `run.out` holds a run that `config` cannot continue.

    Args:
        config: of this start.
        ranks: of this start.
        dataset: fingerprint of the training data of this start.
    """
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
    if saved["dataset"] != dataset:
        raise ConfigError(
            f"data.path {config.data.path} holds other molecules than the run in {config.run.out} was trained on: "
            "give the original dataset, or another run.out"
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


def begin_run(config: RunConfig, ranks: int, dataset: str) -> None:
    """Make the run's folder and note in it what the run is: `config.yaml` to read, `run.json` for `check_resumable`."""
    out = Path(config.run.out)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    record = {"ranks": ranks, "dataset": dataset, "config": config.to_dict()}
    (out / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (section, name)
        for section, values in now.items()
        for name, value in values.items()
        if before.get(section, {}).get(name) != value
    ]
