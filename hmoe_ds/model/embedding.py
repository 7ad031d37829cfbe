"""Atom and bond features to states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES


class FeatureEmbedding(nn.Module):
    """Sum of one embedding per feature; a hidden row gets the learned mask vector instead.

    Args:
        sizes: number of values of each feature.
        hidden_size: width D.
    """

    offset: Tensor

    def __init__(self, sizes: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(sum(sizes), hidden_size) / len(sizes) ** 0.5)
        self.mask = nn.Parameter(torch.randn(hidden_size))
        offset = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, features_RF: Tensor, hidden_R: Tensor | None = None) -> Tensor:
        """[R rows, F features] uint8 -> [R, D]; `hidden_R` says which rows are masked."""
        states_RD = F.embedding_bag(features_RF.long() + self.offset, self.table, mode="sum")
        if hidden_R is None:
            return states_RD
        return torch.where(hidden_R.unsqueeze(-1), self.mask, states_RD)


def atom_embedding(hidden_size: int) -> FeatureEmbedding:
    """Embedding of the 9 Open Graph Benchmark atom features."""
    return FeatureEmbedding(ATOM_FEATURE_SIZES, hidden_size)


def bond_embedding(hidden_size: int) -> FeatureEmbedding:
    """Embedding of the 3 Open Graph Benchmark bond features."""
    return FeatureEmbedding(BOND_FEATURE_SIZES, hidden_size)
