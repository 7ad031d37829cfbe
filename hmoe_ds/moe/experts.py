"""Expert feed-forwards and the executor that runs all of them in one process.

An executor takes (tokens, choices, weights) and returns outputs; `deepspeed_ep.py` holds the one that spreads
experts over ranks. Both have the parameters `experts.w1`, `experts.w2`, `experts.w3`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hmoe_ds.config import RouterConfig
from hmoe_ds.data.hashing import hash64


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


def gated_feed_forward(x_ND: Tensor, w1_FD: Tensor, w2_DF: Tensor, w3_FD: Tensor) -> Tensor:
    """`w2(silu(w1 x) * w3 x)`; [N, D] -> [N, D]."""
    return F.linear(F.silu(F.linear(x_ND, w1_FD)) * F.linear(x_ND, w3_FD), w2_DF)


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
        apply = grouped_feed_forward if _has_grouped_kernel(x_ND, self.w1) else looped_feed_forward
        if x_ND.shape[0] <= self._max_rows:
            return apply(x_ND, ends_E, *weights)
        chunks = []
        for number, chunk_ND in enumerate(x_ND.split(self._max_rows)):
            chunk_ends_E = (ends_E - number * self._max_rows).clamp(0, chunk_ND.shape[0])
            chunks.append(checkpoint(apply, chunk_ND, chunk_ends_E, *weights, use_reentrant=False))
        return torch.cat(chunks)


def looped_feed_forward(x_ND: Tensor, ends_E: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Tensor:
    """Expert e on the rows from `ends_E[e - 1]` to `ends_E[e]`, one expert after the other."""
    counts = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    experts = zip(x_ND.split(counts), w1_EFD.unbind(0), w2_EDF.unbind(0), w3_EFD.unbind(0), strict=True)
    return torch.cat([gated_feed_forward(*expert) for expert in experts])


def grouped_feed_forward(x_ND: Tensor, ends_E: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Tensor:
    """Expert e on the rows from `ends_E[e - 1]` to `ends_E[e]`, all in one kernel for each matrix."""
    offsets_E = ends_E.to(torch.int32)
    gate_NF = F.grouped_mm(x_ND, w1_EFD.transpose(1, 2), offs=offsets_E)
    value_NF = F.grouped_mm(x_ND, w3_EFD.transpose(1, 2), offs=offsets_E)
    return F.grouped_mm(F.silu(gate_NF) * value_NF, w2_EDF.transpose(1, 2), offs=offsets_E)


def _has_grouped_kernel(x_ND: Tensor, w1_EFD: Tensor) -> bool:
    """Whether torch has a grouped matrix product for these: on CUDA, in bf16, with rows of whole 16 bytes."""
    aligned = all(size % 8 == 0 for size in w1_EFD.shape[1:])
    fits = x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and aligned and x_ND.shape[0] > 0
    return fits and hasattr(F, "grouped_mm")  # since torch 2.10


class Assignments(NamedTuple):
    """(token, expert) pairs sorted by expert; A pairs, N * K unless choices are unused."""

    token_A: Tensor
    weight_A: Tensor
    counts_E: Tensor


def sort_by_expert(choices_NK: Tensor, weights_NK: Tensor, router: RouterConfig) -> Assignments:
    """Sort the pairs of tokens and chosen experts by expert; ties keep the order of tokens.

    Unused choices are dropped.
    """
    expert_A = choices_NK.reshape(-1)
    order_A = torch.argsort(expert_A, stable=True)
    counts_E = torch.bincount(expert_A, minlength=router.experts)
    if router.top_p < 1:
        # Unused choices have the number behind the last expert's. How many are used must be known on the host.
        counts_E = counts_E[: router.experts]
        order_A = order_A[: int(counts_E.sum())]
    return Assignments(
        token_A=order_A // choices_NK.shape[1],
        weight_A=weights_NK.reshape(-1)[order_A],
        counts_E=counts_E,
    )


def combine(y_AD: Tensor, assignments: Assignments, num_tokens: int) -> Tensor:
    """Weighted sum of expert outputs for each token; [A, D] -> [N, D]."""
    weighted_AD = y_AD * assignments.weight_A.unsqueeze(-1).to(y_AD.dtype)
    return y_AD.new_zeros(num_tokens, y_AD.shape[1]).index_add(0, assignments.token_A, weighted_AD)


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
        assignments = sort_by_expert(choices_NK, weights_NK, self._router)
        y_AD = self.experts(x_ND[assignments.token_A], assignments.counts_E)
        return combine(y_AD, assignments, x_ND.shape[0])
