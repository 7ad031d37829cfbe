"""Atom and bond features to states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES
from hmoe_ds.moe.wide import wide


class FeatureEmbedding(nn.Module):
    """Sum of one embedding per feature; a hidden row gets the learned mask vector instead.

    Args:
        sizes: number of values of each feature.
        hidden_size: width D.
    """

    offset: Tensor
    instead: Tensor

    def __init__(self, sizes: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(sum(sizes), hidden_size) / len(sizes) ** 0.5)
        self.mask = nn.Parameter(torch.randn(hidden_size))
        # What is not saved has its values also in a model that is built on the meta device, to be loaded.
        offset = torch.tensor([0, *sizes[:-1]], device="cpu").cumsum(0)
        self.register_buffer("offset", offset, persistent=False)
        # Behind the table lie the mask vector and zeros: of the features of a hidden row one has the former, the others
        # the latter. So no second pass over the states is needed, forward or backward.
        instead = torch.full((len(sizes),), sum(sizes) + 1, device="cpu")
        instead[0] = sum(sizes)
        self.register_buffer("instead", instead, persistent=False)

    def forward(self, features_RF: Tensor, hidden_R: Tensor | None = None) -> Tensor:
        """[R rows, F features] uint8 -> [R, D]; `hidden_R` says which rows are masked."""
        rows_RF = features_RF.long() + self.offset
        # Wide, as on a CPU the gradient of a row of the table is added up atom by atom: in bf16 it would stop at 256.
        table = wide(self.table)
        if hidden_R is None:
            return F.embedding_bag(rows_RF, table, mode="sum").to(self.table.dtype)
        rows_RF = torch.where(hidden_R.unsqueeze(-1), self.instead, rows_RF)
        mask_D = wide(self.mask)
        table = torch.cat([table, mask_D.unsqueeze(0), torch.zeros_like(mask_D).unsqueeze(0)])
        states_RD = F.embedding_bag(rows_RF, table, mode="sum", padding_idx=len(table) - 1)
        return states_RD.to(self.table.dtype)


def atom_embedding(hidden_size: int) -> FeatureEmbedding:
    """Embedding of the 9 Open Graph Benchmark atom features."""
    return FeatureEmbedding(ATOM_FEATURE_SIZES, hidden_size)


def bond_embedding(hidden_size: int) -> FeatureEmbedding:
    """Embedding of the 3 Open Graph Benchmark bond features."""
    return FeatureEmbedding(BOND_FEATURE_SIZES, hidden_size)
