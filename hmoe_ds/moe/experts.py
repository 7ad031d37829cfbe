"""Expert feed-forwards and the executor that runs all of them in one process.

An executor takes (tokens, choices, weights) and returns outputs; `deepspeed_ep.py` holds the one that spreads
experts over ranks. Both have the parameters `experts.w1`, `experts.w2`, `experts.w3`.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmoe_ds.config import RouterConfig
from hmoe_ds.data.hashing import hash64
from hmoe_ds.moe.dispatch import from_experts, sort_by_expert, to_experts
from hmoe_ds.moe.grouped import grouped_feed_forward


class GatedFeedForward(nn.Module):
    """Dense gated feed-forward `w2(silu(w1 x) * w3 x)` without biases (SwiGLU; Shazeer, 2020).

    Args:
        hidden_size: width D of input and output.
        size: hidden width F.
    """

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, size, bias=False)
        self.w2 = nn.Linear(size, hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, size, bias=False)
        for weight in (self.w1.weight, self.w2.weight, self.w3.weight):
            init_matrix(weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]"""
        return self.w2(F.silu(self.w1(x_ND)) * self.w3(x_ND))


def init_matrix(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """Normal with standard deviation 1/sqrt(fan-in): outputs have the same scale whatever the width."""
    nn.init.normal_(weight, std=1.0 / math.sqrt(weight.shape[-1]), generator=generator)


class Experts(nn.Module):
    """`count` gated feed-forwards with global ids `first`, `first + 1`, ...

    Each is initialised from (seed, layer, global id) alone, so a model does not depend on how its experts are
    spread over ranks.

    Args:
        count: experts held here.
        hidden_size: width D.
        size: hidden width F.
        seed: of the initialisation.
        layer: number of the layer's block among the upper blocks, from 1.
        first: global id of the first expert held here.
        max_rows: rows of all experts computed at once; more go in chunks that are recomputed in the backward.
    """

    def __init__(
        self,
        count: int,
        hidden_size: int,
        size: int,
        seed: int,
        layer: int,
        first: int = 0,
        max_rows: int = 1 << 62,
    ) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(count, size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(count, hidden_size, size))
        self.w3 = nn.Parameter(torch.empty(count, size, hidden_size))
        self._max_rows = max_rows
        if self.w1.is_meta:  # shapes without values: a model that is only measured
            return
        for expert in range(count):
            generator = torch.Generator().manual_seed(int(hash64(seed, layer, first + expert)[0] >> 1))
            for weight in (self.w1, self.w2, self.w3):
                init_matrix(weight.data[expert], generator)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Apply expert e to its `counts_E[e]` consecutive rows; [N, D] -> [N, D].

        An expert without rows gets a gradient too (of zeros).
        """
        ends_E = counts_E.cumsum(0)
        weights = (self.w1, self.w2, self.w3)
        if x_ND.shape[0] <= self._max_rows:
            return grouped_feed_forward(x_ND, ends_E, *weights)
        chunks = []
        for number, chunk_ND in enumerate(x_ND.split(self._max_rows)):
            chunk_ends_E = (ends_E - number * self._max_rows).clamp(0, chunk_ND.shape[0])
            chunks.append(checkpoint(grouped_feed_forward, chunk_ND, chunk_ends_E, *weights, use_reentrant=False))
        return torch.cat(chunks)


class Executor(Protocol):
    """Makes the executor of one H-MoE layer."""

    def __call__(self, router: RouterConfig, hidden_size: int, seed: int, layer: int) -> nn.Module: ...


class LocalExecutor(nn.Module):
    """Runs all experts of a layer in this process.

    Args:
        router: number and size of the experts.
        hidden_size: width D.
        seed: of the initialisation.
        layer: number of the layer's block among the upper blocks, from 1.
    """

    def __init__(self, router: RouterConfig, hidden_size: int, seed: int, layer: int) -> None:
        super().__init__()
        self._router = router
        self.experts = Experts(
            router.experts, hidden_size, router.expert_size, seed, layer, max_rows=router.max_received
        )

    def forward(self, x_ND: Tensor, choices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, nothing dropped; [N, D] -> [N, D]."""
        assignments = sort_by_expert(choices_NK, self._router)
        y_AD = self.experts(to_experts(x_ND, assignments), assignments.counts_E)
        return from_experts(y_AD, weights_NK, assignments)
