"""Readout: the atom states of each molecule as one vector, from which a head tells what the molecule is."""

from __future__ import annotations

import torch
from torch import Tensor

from hmoe_ds.config import Readout
from hmoe_ds.data.batch import MolBatch, sum_by_molecule
from hmoe_ds.moe.wide import wide

# Atoms of a molecule, about: brings sums over atoms, and the logarithm of their number, to the order of 1.
TYPICAL_ATOMS = 32


def read_out(readout: Readout, h_ND: Tensor, batch: MolBatch) -> Tensor:
    """Atom states of B molecules to their readouts; -> [B, W], W = `size.readout_width`

    A mean over atoms tells neither how large a molecule is nor whether one of its atoms is unusual, and a quantity that
    adds up over atoms is the mean times their number, which a head can only learn for the sizes that it has seen. So
    the others have beside it, in the order of their names: the largest value of each feature over the atoms (`max`),
    the sum over 32 (`sum`), and the logarithm of the number of atoms over 32 (`size`).
    """
    mean_BD = mean_state(h_ND, batch)
    if readout == "mean":
        return mean_BD
    # Not torch.segment_reduce: its backward gives each of several equal maxima the whole gradient, if that is negative.
    # Nor zeros without `include_self`: the backward takes them for maxima where these are 0.
    lowest_BD = h_ND.new_full(mean_BD.shape, -torch.inf)
    largest_BD = lowest_BD.scatter_reduce(0, batch.molecule_N.unsqueeze(1).expand_as(h_ND), h_ND, "amax")
    precise = torch.promote_types(h_ND.dtype, torch.float32)
    relative_B1 = batch.ptr_B.diff().unsqueeze(1).to(precise) / TYPICAL_ATOMS
    parts = [mean_BD, largest_BD, relative_B1.log().to(h_ND.dtype)]
    if readout == "mean+max+sum+size":
        parts.insert(2, (mean_BD * relative_B1).to(h_ND.dtype))
    return torch.cat(parts, dim=1)


def mean_state(h_ND: Tensor, batch: MolBatch) -> Tensor:
    """Atom states to their mean over each molecule; -> [B, D]"""
    # A sum of many atoms in bf16 would lose the last ones.
    total_BD = sum_by_molecule(wide(h_ND), batch.molecule_N, batch.num_molecules)
    return (total_BD / batch.ptr_B.diff().unsqueeze(-1)).to(h_ND.dtype)
