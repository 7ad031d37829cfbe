"""The folder of a run: what it is (`config.yaml`, `run.json`), where its checkpoints are, and who may continue it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from data_pipeline.schema import SPLITS
from hmoe_ds.config import ConfigError, RunConfig, config_from_dict, save_config
from hmoe_ds.data.cache import ShardCache
from hmoe_ds.data.mixture import Mixture, open_mixture
from hmoe_ds.model.checkpoint_record import read_record

RECORD, LATEST = "run.json", "latest"
FORMAT_VERSION = 2
_TAG_PREFIX = "step"


def checkpoint_dir(config: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.run.out) / "checkpoints"


def has_checkpoint(config: RunConfig) -> bool:
    """Whether there is one to resume from."""
    return bool(config.run.out) and (checkpoint_dir(config) / LATEST).is_file()


def checkpoint_tag(step: int) -> str:
    """Name of the checkpoint after `step` steps, as `latest` holds it."""
    return f"{_TAG_PREFIX}{step:08d}"


def latest_checkpoint(config: RunConfig) -> Path:
    """Folder of the latest checkpoint; there must be one. Raises ConfigError when `latest` does not name it."""
    file = checkpoint_dir(config) / LATEST
    name = file.read_text(errors="replace").strip()
    if not re.fullmatch(_TAG_PREFIX + r"\d{8,}", name):
        raise ConfigError(
            f"{file} holds {name[:80]!r}, which is no checkpoint's name: write the name of the last one into it, "
            f"such as {checkpoint_tag(1000)}"
        )
    return checkpoint_dir(config) / name


def name_latest(config: RunConfig, step: int) -> None:
    """Make the checkpoint after `step` steps, which is complete, the latest one."""
    replace_text(checkpoint_dir(config) / LATEST, checkpoint_tag(step))


def steps_done(config: RunConfig) -> int:
    """Steps of the latest checkpoint; 0 without one."""
    return int(latest_checkpoint(config).name.removeprefix(_TAG_PREFIX)) if has_checkpoint(config) else 0


def open_datasets(config: RunConfig) -> tuple[Mixture, Mixture]:
    """Training and validation split of a run; a run that is resumed sees the shards it began with, and no later ones.

    Raises:
        PipelineError: no dataset at `data.path`.
    """
    extents = read_run_record(Path(config.run.out))["shards"] if has_checkpoint(config) else None
    caches: list[ShardCache] = []
    targets = any(config.objective.molecule_heads)
    training, validation = (open_mixture(config.data, split, extents, caches, targets) for split in SPLITS)
    return training, validation


def check_run_folder(config: RunConfig) -> None:
    """Raise ConfigError when `run.out` cannot be written, or holds a run that may not or cannot be continued."""
    out = Path(config.run.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"run.out {out} is a file: give a folder")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"run.out {out} cannot be made, as {existing} cannot be written to: give another folder")
    if not has_checkpoint(config):
        return
    if config.run.resume == "never":
        raise ConfigError(
            f"run.out {out} already holds a run with checkpoints and run.resume is never: "
            "set run.resume to auto, or give another run.out"
        )
    read_run_record(out)
    read_record(latest_checkpoint(config))


def check_resumable(config: RunConfig, ranks: int, dataset: str) -> None:
    """Raise ConfigError when `run.out` holds a run that `config` cannot continue, CheckpointError when nobody can.

    Args:
        config: of this start; `check_run_folder` comes first.
        ranks: of this start.
        dataset: fingerprint of the training data of this start.
    """
    if not has_checkpoint(config):
        return
    out = Path(config.run.out)
    saved = read_run_record(out)
    if saved["ranks"] != ranks:
        raise ConfigError(
            f"run.out {out} was trained on {saved['ranks']} ranks, this start has {ranks}: "
            f"start {saved['ranks']} ranks, or give another run.out"
        )
    if saved["dataset"] != dataset:
        raise ConfigError(
            f"data.path {config.data.path} does not begin with the molecules that the run in {out} was trained on: "
            "give the original dataset, or another run.out"
        )
    if config.run.steps < steps_done(config):
        raise ConfigError(
            f"run.steps is {config.run.steps}, but the run in {out} has done {steps_done(config)}: "
            "set run.steps to at least that, or give another run.out"
        )
    _check_unchanged(saved["config"], config)


# What may change between the parts of one run without making it another run.
_FREE_ON_RESUME = {
    *(
        ("run", name)
        for name in (
            *("out", "steps", "resume", "log_every", "validate_every", "checkpoint_every", "mlflow", "check_memory"),
        )
    ),
    *(("data", name) for name in ("path", "validation_molecules", "cache_dir", "cache_gb")),
    *(("probe", name) for name in ("tables", "every", "max_molecules")),
}


def _check_unchanged(saved: dict[str, Any], config: RunConfig) -> None:
    # A field that is younger than the run has its default, which is what the run did without it.
    before, now = config_from_dict(saved).to_dict(), config.to_dict()
    for section, values in now.items():
        for name, value in values.items():
            if value != before[section][name] and (section, name) not in _FREE_ON_RESUME:
                raise ConfigError(
                    f"{section}.{name} is {value!r}, but the run in {config.run.out} has {before[section][name]!r}: "
                    "set it back, or give another run.out"
                )


def read_run_record(folder: Path) -> dict[str, Any]:
    """Content of `run.json`: `ranks`, `dataset`, `shards`, `config`. Raises ConfigError when it cannot be read."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give another run.out") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{path} is of another version of hmoe_ds: give another run.out")
    missing = {"ranks", "dataset", "shards", "config"} - record.keys()
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}: give another run.out")
    return record


def begin_run(config: RunConfig, ranks: int, dataset: str, shards: list[dict[str, int]]) -> None:
    """Make the run's folder and note in it what the run is: `config.yaml` to read, `run.json` for `check_resumable`."""
    out = Path(config.run.out)
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, out / "config.yaml")
    record = {
        "format_version": FORMAT_VERSION,
        "ranks": ranks,
        "dataset": dataset,
        "shards": shards,
        "config": config.to_dict(),
    }
    replace_text(out / RECORD, json.dumps(record, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or as it was, even after a crash."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
