"""Pretraining heads: what a hidden atom or bond is, from the states around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES

NUM_ELEMENTS = ATOM_FEATURE_SIZES[0]
NUM_BOND_TYPES = BOND_FEATURE_SIZES[0]


class MaskedAtomHead(nn.Module):
    """Predicts the element of an atom.

    Args:
        hidden_size: width D.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, NUM_ELEMENTS)
        )

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
        self.layers = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, NUM_BOND_TYPES)
        )

    def forward(self, begin_MD: Tensor, end_MD: Tensor) -> Tensor:
        """Two [M, D] -> logits [M, 5]; the direction of the bond does not matter."""
        return self.layers(torch.cat([begin_MD + end_MD, (begin_MD - end_MD).abs()], dim=-1))
