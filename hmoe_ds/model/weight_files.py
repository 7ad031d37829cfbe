"""The weights in a training checkpoint: one file of what all ranks share, one file for each part of the experts.

They lie beside the training engine's own files, which depend on the ZeRO stage and hold optimizer state as well.
These depend on the expert parallelism alone and are read without the engine.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hmoe_ds.model.checkpoint_record import CheckpointError

SHARED_FILE = "weights.safetensors"


def experts_file(part: int, parts: int) -> str:
    """Name of the file of the experts that rank `part` of an expert-parallel group of `parts` ranks holds."""
    return f"experts-{part:05d}-of-{parts:05d}.safetensors"


def weight_files(parts: int) -> list[str]:
    """Names of all of them, for experts that are spread over `parts` ranks."""
    return [SHARED_FILE, *(experts_file(part, parts) for part in range(parts))]


def read_weights(folder: Path, parts: int) -> dict[str, Tensor]:
    """The weights of the whole model, experts in order of their global id.

    Args:
        folder: of the checkpoint.
        parts: ranks over which the experts were spread.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    weights = _read(folder / SHARED_FILE)
    experts = [_read(folder / experts_file(part, parts)) for part in range(parts)]
    for name in experts[0]:
        weights[name] = torch.cat([part[name] for part in experts])
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}: copy the whole checkpoint") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy it again, or use another checkpoint") from error
