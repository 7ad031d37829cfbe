"""Pretraining heads: what a hidden atom or bond is, from the states around it; what a molecule is, from its readout.

Only the heads of the objectives that are on exist: a parameter without a gradient is no part of a model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES, DESCRIPTORS, FINGERPRINT_BINS
from hmoe_ds.model.readout import TYPICAL_ATOMS

NUM_ELEMENTS = ATOM_FEATURE_SIZES[0]
NUM_BOND_TYPES = BOND_FEATURE_SIZES[0]
NUM_DESCRIPTORS = len(DESCRIPTORS)


class MaskedAtomHead(nn.Module):
    """Predicts the element of an atom.

    Args:
        hidden_size: width D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = _mlp(hidden_size, hidden_size, NUM_ELEMENTS)

    def forward(self, h_ND: Tensor) -> Tensor:
        """[N, D] -> logits [N, 119]"""
        return self.layers(h_ND)


class MaskedBondHead(nn.Module):
    """Predicts the type of a bond from the sum and the distance of its two atoms' states.

    Args:
        hidden_size: width D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = _mlp(2 * hidden_size, hidden_size, NUM_BOND_TYPES)

    def forward(self, begin_MD: Tensor, end_MD: Tensor) -> Tensor:
        """Two [M, D] -> logits [M, 5]; the direction of the bond does not matter."""
        return self.layers(torch.cat([begin_MD + end_MD, (begin_MD - end_MD).abs()], dim=-1))


class FingerprintHead(nn.Module):
    """Predicts how the environments of a molecule's atoms spread over the bins of its Morgan fingerprint.

    Args:
        width: W, of the readout.
        hidden_size: width of its hidden layer.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = _mlp(width, hidden_size, FINGERPRINT_BINS)

    def forward(self, readout_BW: Tensor) -> Tensor:
        """Readouts [B, W] -> logits [B, V]"""
        return self.layers(readout_BW)


class DescriptorHead(nn.Module):
    """Predicts a molecule's descriptors, in standard deviations from their means.

    Many of them (weight, surface, counts) grow with the molecule, which a mean over atoms cannot tell: so each is
    predicted as a part by molecule plus a part by atom, times the number of atoms.

    Args:
        width: W, of the readout.
        hidden_size: width of its hidden layer.
    """

    mean_T: Tensor
    deviation_T: Tensor

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = _mlp(width, hidden_size, 2 * NUM_DESCRIPTORS)
        # Of the training molecules; buffers, so that who loads the model can give its predictions their units back.
        self.register_buffer("mean_T", torch.zeros(NUM_DESCRIPTORS))
        self.register_buffer("deviation_T", torch.ones(NUM_DESCRIPTORS))

    def forward(self, readout_BW: Tensor, atoms_B: Tensor) -> Tensor:
        """Readouts [B, W] and numbers of atoms [B] -> standardised descriptors [B, T]"""
        by_molecule_BT, by_atom_BT = self.layers(readout_BW).chunk(2, dim=-1)
        size_B = (atoms_B / TYPICAL_ATOMS).to(readout_BW.dtype)
        return by_molecule_BT + size_B.unsqueeze(-1) * by_atom_BT

    def set_scale(self, mean_T: Tensor, deviation_T: Tensor) -> None:
        """Standardise by these means and standard deviations; a descriptor that is constant is only shifted."""
        self.mean_T.copy_(mean_T)
        self.deviation_T.copy_(torch.where(deviation_T > 0, deviation_T, 1.0))

    def standardize(self, descriptors_BT: Tensor) -> Tensor:
        """Descriptors in their own units -> in standard deviations from their means."""
        return (descriptors_BT - self.mean_T) / self.deviation_T


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
