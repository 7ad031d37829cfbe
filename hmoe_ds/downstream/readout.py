"""Readout: the atom states of each molecule as one vector, from which a head tells properties."""

from __future__ import annotations

import torch
from torch import Tensor

from hmoe_ds.data.batch import MolBatch
from hmoe_ds.downstream.predictor_record import Readout
from hmoe_ds.model.heads import TYPICAL_ATOMS
from hmoe_ds.model.hmoe import HMoEModel


def readout_width(readout: Readout, hidden_size: int) -> int:
    """Width W of what `read_out` gives."""
    return hidden_size if readout == "mean" else 2 * hidden_size + 1


def read_out(readout: Readout, model: HMoEModel, batch: MolBatch) -> Tensor:
    """What `model` makes of B molecules; -> [B, W]

    A mean over atoms tells neither how large a molecule is nor whether one of its atoms is unusual: `mean+max+size`
    has beside it the largest value of each feature over the atoms, and the logarithm of their number.
    """
    h_ND = model(batch).h_ND
    mean_BD = model.readout(h_ND, batch)
    if readout == "mean":
        return mean_BD
    largest_BD = torch.segment_reduce(h_ND, "max", offsets=batch.ptr_B)
    size_B1 = (batch.ptr_B.diff().unsqueeze(1) / TYPICAL_ATOMS).log().to(h_ND.dtype)
    return torch.cat([mean_BD, largest_BD, size_B1], dim=1)
