"""What a model is familiar with: scaffolds of its pretraining, from which the novelty of others is told."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hmoe_ds.model.description import FAMILIAR, ModelFormatError

NEIGHBOURS = 5
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
        """Of the readouts of more than `NEIGHBOURS` molecules, [R, D]."""
        distance_R = torch.cat([_distance(part, readout_RD, skipped=1) for part in readout_RD.split(_ROWS)])
        return cls(readout_RD, distance_R.median())

    def novelty(self, readout_BD: Tensor) -> Tensor:
        """Mean distance of B readouts from the nearest familiar ones, over what is usual among these; -> [B]

        1 is as far as molecules of the pretraining are from each other; what is larger is less familiar.
        """
        reference_RD = self.readout_RD.to(readout_BD.device)
        parts = [_distance(part.float(), reference_RD) for part in readout_BD.split(_ROWS)]
        return torch.cat(parts) / self.usual.to(readout_BD.device)


def _distance(readout_BD: Tensor, reference_RD: Tensor, skipped: int = 0) -> Tensor:
    """Mean distance from the nearest, without the first `skipped` of them; -> [B]"""
    # By matrix products, distances would depend on how many rows are computed together, by rounding.
    distance_BR = torch.cdist(readout_BD, reference_RD, compute_mode="donot_use_mm_for_euclid_dist")
    return distance_BR.topk(NEIGHBOURS + skipped, dim=1, largest=False).values[:, skipped:].mean(dim=1)


def write_familiar(folder: Path, familiar: Familiar) -> None:
    """Write it beside an exported model."""
    content = {name: value.cpu().contiguous() for name, value in familiar._asdict().items()}
    save_file(content, folder / FAMILIAR)


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
