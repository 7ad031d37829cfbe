"""Export: a training checkpoint to one topology-free folder, experts of all ranks merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from hmoe_ds.config import RunConfig
from hmoe_ds.downstream.out_files import check_outside
from hmoe_ds.model.checkpoint_record import (
    CheckpointError,
    check_files,
    find_checkpoint,
    read_list,
    read_record,
    recorded_config,
)
from hmoe_ds.model.description import CARD, CONFIG, WEIGHTS, Description
from hmoe_ds.model.hmoe import HMoEModel, weights_of
from hmoe_ds.model.pretrained import write_pretrained
from hmoe_ds.model.weight_files import read_weights, weight_files

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a checkpoint's record says of the training, as far as it does; older ones say less.
_TOLD = ("step", "dataset", "molecules", "standardize", "sources", "validation", "mlflow_run")


def export_checkpoint(
    path: str | Path, out: str | Path, dtype: str | None = None, heads: bool = True
) -> dict[str, Any]:
    """Merge a checkpoint into `out/model.safetensors`, `out/config.json` and a model card, `out/README.md`.

    Args:
        path: a run's folder, its `checkpoints` folder (both mean the latest one), or one checkpoint.
        out: folder to write, made if need be.
        dtype: of the parameters, one of `DTYPES`; without it that of the training. Buffers of the routing keep theirs.
        heads: keep the heads of the pretraining objectives, which embedding and fine-tuning do not need.

    Returns:
        What the checkpoint is: step, parameters, path.

    Raises:
        CheckpointError: no checkpoint there, or one that is damaged or incomplete.
        UsageError: `out` is in the checkpoint, or has files of something else that would be replaced.
    """
    folder, out = find_checkpoint(Path(path)), Path(out)
    _check_place(out, folder)
    record = read_record(folder)
    config = recorded_config(folder, record)
    files = weight_files(config.parallel.ep_size)
    check_files(folder, [file for file in read_list(folder) if file.name in files])
    weights = read_weights(folder, config.parallel.ep_size)
    _check_complete(folder, weights, config)
    told = {name: record[name] for name in _TOLD if name in record}
    kept = config.objective.molecule_heads if heads else None
    description = Description(config.model, config.router, kept, {**told, "config": config.to_dict()})
    weights = _converted(weights, description, None if dtype is None else DTYPES[dtype])
    write_pretrained(out, weights, description)
    parameters = sum(value.numel() for value in weights.values())
    return {"checkpoint": str(folder), "step": record["step"], "parameters": parameters, "out": str(out)}


def _check_place(out: Path, checkpoint: Path) -> None:
    """Raise UsageError unless `out` is new, or without files that an export would replace, or an export."""
    check_outside(out, checkpoint, f"OUT {out}")
    try:
        is_export = "format_version" in json.loads((out / CONFIG).read_text())
    except FileNotFoundError:
        is_export = (out / WEIGHTS).exists()  # interrupted, or too little to tell
    except (ValueError, TypeError):
        is_export = False
    taken = [name for name in (CARD, CONFIG) if (out / name).exists()]
    if taken and not is_export:
        raise UsageError(f"OUT {out} has a {taken[0]} of something else, which would be replaced: give another folder")


def _check_complete(folder: Path, weights: dict[str, Tensor], config: RunConfig) -> None:
    """Raise CheckpointError unless `weights` are those of the model that `config` describes."""
    with torch.device("meta"):  # shapes without values
        expected = HMoEModel(config.model, config.router, heads=config.objective.molecule_heads).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (tuple(state[name].shape) if name in state else None for state in (weights, expected))
        if found != wanted:
            raise CheckpointError(f"{folder}: {name} has shape {found}, expected {wanted}: copy the whole checkpoint")


def _converted(weights: dict[str, Tensor], description: Description, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights of the model that is described; its parameters as `dtype`."""
    kept = weights_of(description, weights)
    if dtype is None:
        return kept
    with torch.device("meta"):
        model = HMoEModel(description.model, description.router, heads=description.heads)
    parameters = {name for name, _ in model.named_parameters()}
    return {name: value.to(dtype) if name in parameters else value for name, value in kept.items()}
