"""What is computed in fp32, or wider, in a model of narrower parameters and states: routing, means, losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideLinear(nn.Linear):
    """`nn.Linear` that computes in fp32, or wider, whatever the dtype of its parameters and input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(wide(x), wide(self.weight), None if self.bias is None else wide(self.bias))


class WideLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that computes in fp32, or wider, whatever the dtype of its parameters and input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)
