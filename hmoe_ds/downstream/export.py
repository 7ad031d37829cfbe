"""Export: a training checkpoint to one topology-free directory, experts of all ranks merged."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UsageError
from hmoe_ds.config import RunConfig, config_from_dict
from hmoe_ds.model.hmoe import HMoEModel, write_pretrained

_PREFIX = "model."
_MODEL_FILE = "mp_rank_00_model_states.pt"
_EXPERT_FILE = re.compile(r"layer_\d+_expert_(\d+)_mp_rank_00_model_states\.pt")


class CheckpointError(UsageError):
    """A path that holds no checkpoint, or one that is incomplete."""


def export_checkpoint(path: str | Path, out: str | Path) -> dict[str, Any]:
    """Merge a checkpoint into `out/model.safetensors` and `out/config.json`.

    Args:
        path: a run's folder, its `checkpoints` folder (both mean the latest one), or one checkpoint.
        out: directory to write, made if need be.

    Returns:
        What the checkpoint is: step, parameters, path.

    Raises:
        CheckpointError: no checkpoint there, or expert files are missing.
    """
    folder = find_checkpoint(Path(path))
    state = _load(folder / _MODEL_FILE)
    if "hmoe_ds" not in state:
        raise CheckpointError(f"{folder} was not written by hmoe_ds: give a checkpoint that `hmoe pretrain` wrote")
    config = config_from_dict(state["hmoe_ds"]["config"])
    weights = {name.removeprefix(_PREFIX): value for name, value in state["module"].items()}
    weights.update(_merge_experts(folder, config.router.experts))
    _check_complete(folder, weights, config)
    metadata = {
        "step": state["hmoe_ds"]["step"],
        "dataset_fingerprint": state["hmoe_ds"]["dataset"],
        "config": config.to_dict(),
    }
    write_pretrained(out, weights, config.model, config.router, metadata)
    parameters = sum(value.numel() for value in weights.values())
    return {"checkpoint": str(folder), "step": metadata["step"], "parameters": parameters, "out": str(out)}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means; see `export_checkpoint`."""
    for parent in (path / "checkpoints", path):
        if (parent / "latest").is_file():
            return parent / (parent / "latest").read_text().strip()
    if not (path / _MODEL_FILE).is_file():
        raise CheckpointError(
            f"{path} holds no checkpoint: give a run's folder, its checkpoints folder or one checkpoint in it"
        )
    return path


def _load(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file} cannot be read ({type(error).__name__}): export another checkpoint") from error


def _check_complete(folder: Path, weights: dict[str, Tensor], config: RunConfig) -> None:
    """Raise CheckpointError unless `weights` are those of the model that `config` describes."""
    expected = HMoEModel(config.model, config.router).state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (tuple(state[name].shape) if name in state else None for state in (weights, expected))
        if found != wanted:
            raise CheckpointError(f"{folder}: {name} has shape {found}, expected {wanted}: copy the whole checkpoint")


def _merge_experts(folder: Path, num_experts: int) -> dict[str, Tensor]:
    """Stack the per-expert files `layer_L_expert_E_...` into the weights of all experts of each layer."""
    by_name: dict[str, dict[int, Tensor]] = {}
    for file in sorted(folder.iterdir()):
        match = _EXPERT_FILE.fullmatch(file.name)
        if match is None:
            continue
        expert = int(match.group(1))
        for key, value in _load(file).items():
            name = key.removeprefix(_PREFIX).removesuffix(f".{expert}")
            by_name.setdefault(name, {})[expert] = value
    for name, experts in by_name.items():
        missing = sorted(set(range(num_experts)) - set(experts))
        if missing:
            raise CheckpointError(f"{folder} lacks the files of experts {missing} of {name}: copy the whole checkpoint")
    return {name: torch.stack([experts[e] for e in range(num_experts)]) for name, experts in by_name.items()}
