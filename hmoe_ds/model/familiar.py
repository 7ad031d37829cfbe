"""What a model is familiar with: scaffolds of its pretraining, from which the novelty of others is told."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.errors import PipelineError
from hmoe_ds.model.description import FAMILIAR, ModelFormatError
from hmoe_ds.model.tensor_file import replace_tensors

NEIGHBOURS = 5
_LEAST_SPREAD = 1e-6  # of the usual distance, beside the size of readouts
_ROWS = 512  # compared at once: all of them with each other would take gigabytes


class Familiar(NamedTuple):
    """Molecules of the pretraining, as the scaffold gate reads them.

    Attributes:
        readout_RD: mean states of their scaffold atoms below the upper blocks (`ScaffoldRouting.readout_BD`); fp32.
        usual: median of the mean distances of each of them from its nearest others.
    """

    readout_RD: Tensor
    usual: Tensor

    @classmethod
    def of(cls, readout_RD: Tensor) -> Familiar:
        """Of readouts [R, D] of more than `NEIGHBOURS` molecules; raises PipelineError when they hardly differ."""
        distance_R = _distances(readout_RD, readout_RD, skipped=1)
        usual = distance_R.median()
        if not usual > _LEAST_SPREAD * readout_RD.norm(dim=1).mean():
            raise PipelineError(
                f"the scaffolds of the {len(readout_RD):,} molecules hardly differ, so no distance from them tells "
                "what is novel: take a dataset with more scaffolds"
            )
        return cls(readout_RD, usual)

    def novelty(self, readout_BD: Tensor) -> Tensor:
        """Mean distance of B readouts from the nearest familiar ones, over what is usual among these; -> [B]

        1 is as far as molecules of the pretraining are from each other; what is larger is less familiar.
        """
        reference_RD = self.readout_RD.to(readout_BD.device)
        return _distances(readout_BD, reference_RD) / self.usual.to(readout_BD.device)


def _distances(readout_BD: Tensor, reference_RD: Tensor, skipped: int = 0) -> Tensor:
    """Mean distance from the nearest, without the first `skipped` of them; -> [B], fp32"""
    # By matrix products, which are ten times as fast as differences; in fp64, where what cancels out does not matter.
    reference_RD = reference_RD.double()
    squared_R = reference_RD.square().sum(dim=1)
    parts = []
    for part in readout_BD.double().split(_ROWS):
        squared_BR = part.square().sum(dim=1, keepdim=True) + squared_R - 2 * part @ reference_RD.t()
        nearest = squared_BR.topk(NEIGHBOURS + skipped, dim=1, largest=False).values[:, skipped:]
        parts.append(nearest.clamp(min=0).sqrt().mean(dim=1))
    return torch.cat(parts).float()


def write_familiar(folder: Path, familiar: Familiar) -> None:
    """Write it beside an exported model."""
    replace_tensors(folder / FAMILIAR, familiar._asdict())


def read_familiar(folder: Path, hidden_size: int) -> Familiar | None:
    """What lies beside an exported model; None without it. Raises ModelFormatError when it is damaged."""
    path = folder / FAMILIAR
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            found = Familiar(*(file.get_tensor(name) for name in Familiar._fields))
    except SafetensorError as error:
        raise ModelFormatError(f"{path} is damaged ({error}): export the checkpoint again, or remove it") from error
    rows, width = found.readout_RD.shape if found.readout_RD.dim() == 2 else (0, 0)
    if rows <= NEIGHBOURS or width != hidden_size or found.usual.dim():
        raise ModelFormatError(
            f"{path} is of another model: it has readouts {list(found.readout_RD.shape)}, expected more than "
            f"{NEIGHBOURS} rows of {hidden_size}; export the checkpoint again, or remove it"
        )
    return found
