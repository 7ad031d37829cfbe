"""The folder of a run: what it is (`config.yaml`, `run.json`), where its checkpoints are, and who may continue it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.durable import make_folder, replace_text
from data_pipeline.errors import PipelineError
from data_pipeline.schema import SPLITS
from hmoe_ds.config import ConfigError, RunConfig, config_from_dict, save_config
from hmoe_ds.data.cache import ShardCache
from hmoe_ds.data.mixture import Mixture, open_mixture
from hmoe_ds.model.checkpoint_record import (
    RECORD_FILE,
    CheckpointError,
    DamagedCheckpointError,
    check_files,
    read_list,
    read_record,
)
from hmoe_ds.run_files import CONFIG, RECORD
from hmoe_ds.training.outcome import forget_outcome

CHECKPOINTS, LATEST = "checkpoints", "latest"
FORMAT_VERSION = 2
_TAG_PREFIX = "step"
_TAG = re.compile(_TAG_PREFIX + r"\d{8,}")


def checkpoint_dir(config: RunConfig) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.run.out) / CHECKPOINTS


def checkpoint_tag(step: int) -> str:
    """Name of the checkpoint after `step` steps, as `latest` holds it."""
    return f"{_TAG_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint, told from its name."""
    return int(checkpoint.name.removeprefix(_TAG_PREFIX))


def is_tag(name: str) -> bool:
    """Whether it is the name of a checkpoint."""
    return _TAG.fullmatch(name) is not None


def newest_step(out: Path) -> int:
    """Steps of the newest checkpoint in the run's folder `out`, whole or not; 0 without one."""
    found = tagged(out / CHECKPOINTS)
    return step_of(found[0]) if found else 0


def tagged(folder: Path) -> list[Path]:
    """What is in the folder of a run's checkpoints and has the name of one, newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _TAG.fullmatch(path.name)), key=step_of, reverse=True)


def candidates(config: RunConfig) -> list[Path]:
    """The checkpoints from which a run may go on, in the order in which they are tried.

    That is the one that `latest` names, then those before it. Later ones are of a run that was set back by hand, or
    were finished just when it was killed: they are made again. A `latest` that names none is of no help.
    """
    found, latest = tagged(checkpoint_dir(config)), named_latest(config)
    return found if latest is None else [path for path in found if step_of(path) <= step_of(Path(latest))]


def named_latest(config: RunConfig) -> str | None:
    """The checkpoint that `latest` names; None when there is no such file, or it names none."""
    file = checkpoint_dir(config) / LATEST
    name = file.read_text(errors="replace").strip() if file.is_file() else ""
    return name if is_tag(name) else None


def checkpoint_to_resume(config: RunConfig) -> Path | None:
    """The checkpoint from which a run goes on, as far as its records tell; None for a run without any.

    Raises:
        CheckpointError: it is of another version, or all are damaged or gone.
    """
    first_damage: DamagedCheckpointError | None = None
    found = candidates(config)
    if not found and (checkpoint_dir(config) / LATEST).exists():
        raise CheckpointError(
            f"{checkpoint_dir(config) / LATEST} tells of a checkpoint, but there is none up to it: copy it back, or "
            "give another run.out"
        )
    for folder in found:
        try:
            read_record(folder)
            check_files(folder, [file for file in read_list(folder) if file.name == RECORD_FILE])
        except DamagedCheckpointError as error:
            first_damage = first_damage or error
        else:
            return folder
    if first_damage is not None:
        raise CheckpointError(
            f"no checkpoint in {checkpoint_dir(config)} is whole ({first_damage}): copy one back, or give another "
            "run.out"
        )
    return None


def has_checkpoint(config: RunConfig) -> bool:
    """Whether there is one to resume from."""
    return bool(config.run.out) and checkpoint_to_resume(config) is not None


def name_latest(config: RunConfig, step: int) -> None:
    """Make the checkpoint after `step` steps, which is complete, the latest one."""
    replace_text(checkpoint_dir(config) / LATEST, checkpoint_tag(step))


def steps_done(config: RunConfig) -> int:
    """Steps of the checkpoint from which a run goes on; 0 without one."""
    folder = checkpoint_to_resume(config) if config.run.out else None
    return step_of(folder) if folder else 0


def open_datasets(config: RunConfig) -> tuple[Mixture, Mixture]:
    """Training and validation split of a run; a run that is resumed sees the shards it began with, and no later ones.

    Raises:
        PipelineError: no dataset at `data.path`.
    """
    extents = read_run_record(Path(config.run.out))["shards"] if has_checkpoint(config) else None
    caches: list[ShardCache] = []
    targets = config.objective.needs_targets
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


def check_resumable(config: RunConfig, dataset: str) -> None:
    """Raise ConfigError when `run.out` holds a run that `config` cannot continue, CheckpointError when nobody can.

    Args:
        config: of this start; `check_run_folder` comes first.
        dataset: fingerprint of the training data of this start.
    """
    checkpoint = checkpoint_to_resume(config) if config.run.out else None
    if checkpoint is None:
        return
    out, done = Path(config.run.out), step_of(checkpoint)
    saved = read_run_record(out)
    if saved["dataset"] != dataset:
        raise ConfigError(
            f"data.path {config.data.path} does not begin with the molecules that the run in {out} was trained on: "
            "give the original dataset, or another run.out"
        )
    if config.run.steps < done:
        raise ConfigError(
            f"run.steps is {config.run.steps}, but the run in {out} has done {done}: "
            "set run.steps to at least that, or give another run.out"
        )
    _check_unchanged(saved["config"], config)


# What may change between the parts of one run without making it another run: neither how it is spread over ranks nor
# how much of an expert's input is worked on at a time changes its result, but for rounding.
_FREE_ON_RESUME = {
    *(("run", name) for name in ("out", "steps", "resume", "mlflow", "log_every", "validate_every")),
    *(
        ("run", name)
        for name in ("checkpoint_every", "keep_checkpoints", "max_skipped", "hang_seconds", "check_memory", "mirror")
    ),
    *(("data", name) for name in ("path", "validation_molecules", "verify", "cache_dir", "cache_gb")),
    *(("probe", name) for name in ("tables", "every", "max_molecules")),
    *(("parallel", name) for name in ("ep_size", "zero_stage", "offload_optimizer", "activation_checkpointing")),
    *(("parallel", name) for name in ("migration", "migration_budget", "deepspeed_config")),
    ("router", "max_received"),
}


def _check_unchanged(saved: dict[str, Any], config: RunConfig) -> None:
    before, now = config_from_dict(saved).to_dict(), config.to_dict()
    for section, values in now.items():
        for name, value in values.items():
            if value != before[section][name] and (section, name) not in _FREE_ON_RESUME:
                raise ConfigError(
                    f"{section}.{name} is {value!r}, but the run in {config.run.out} has {before[section][name]!r}: "
                    "set it back, or give another run.out"
                )


def read_run_record(folder: Path) -> dict[str, Any]:
    """Content of `run.json`: `ranks`, `dataset`, `shards`, `config`, and `starts` since there is that.

    Raises:
        ConfigError: it is missing, damaged or of another version.
        PipelineError: it cannot be read now, which may pass.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give another run.out") from error
    except OSError as error:
        raise PipelineError(f"{path} cannot be read now ({error}): see to the disk, and start again") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{path} is of another version of hmoe_ds: give another run.out")
    missing = {"ranks", "dataset", "shards", "config"} - record.keys()
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(sorted(missing))}: give another run.out")
    return record


def begin_run(config: RunConfig, ranks: int, dataset: str, shards: list[dict[str, int]]) -> None:
    """Make the run's folder and note in it what the run is: `config.yaml` to read, `run.json` for `check_resumable`.

    Args:
        config: of this start.
        ranks: of this start.
        dataset: fingerprint of the training data.
        shards: extent of each dataset.
    """
    out = Path(config.run.out)
    make_folder(out)
    forget_outcome(out)
    save_config(config, out / CONFIG)
    done = steps_done(config)
    before = read_run_record(out).get("starts", []) if done else []
    start = {"step": done, "ranks": ranks, **asdict(config.parallel)}
    record = {
        "format_version": FORMAT_VERSION,
        "ranks": ranks,
        "starts": [*before, start],
        "dataset": dataset,
        "shards": shards,
        "config": config.to_dict(),
    }
    replace_text(out / RECORD, json.dumps(record, indent=2) + "\n")
