"""From tokens to rows that lie expert by expert, and back; on one rank.

Every token has K choices, so A = N * K rows unless choices are unused. Both directions, and their gradients, read rows
from where they are: none is added to in an order that a device may choose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hmoe_ds.config import RouterConfig


class Assignments(NamedTuple):
    """(token, expert) pairs sorted by expert.

    Attributes:
        token_A: token of each row.
        place_NK: row of each choice; A where the choice is unused.
        counts_E: rows of each expert.
    """

    token_A: Tensor
    place_NK: Tensor
    counts_E: Tensor


def sort_by_expert(choices_NK: Tensor, router: RouterConfig) -> Assignments:
    """Sort the pairs of tokens and chosen experts by expert; ties keep the order of tokens."""
    expert_A = choices_NK.reshape(-1)
    order_A = torch.argsort(expert_A, stable=True)
    counts_E = count(choices_NK, router.experts + 1)[:-1]
    place_A = inverse(order_A)
    if router.top_p < 1:
        # Unused choices have the number behind the last expert's. How many are used must be known on the host.
        used = int(counts_E.sum())
        order_A, place_A = order_A[:used], place_A.clamp(max=used)
    return Assignments(order_A // choices_NK.shape[1], place_A.view_as(choices_NK), counts_E)


def inverse(order_A: Tensor) -> Tensor:
    """Where each row goes in this order of all rows."""
    return torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))


def reorder(x_AD: Tensor, order_A: Tensor, place_A: Tensor) -> Tensor:
    """All rows in another order, of which `place_A` is the inverse."""
    return _ToExperts.apply(x_AD, order_A, place_A.unsqueeze(1))


def count(ids: Tensor, size: int) -> Tensor:
    """How often each of the numbers below `size` occurs. `bincount` does the same, but a GPU's lets the host wait."""
    ids = ids.flatten()
    return ids.new_zeros(size).index_add(0, ids, torch.ones_like(ids))


def to_experts(x_ND: Tensor, assignments: Assignments) -> Tensor:
    """The rows of all choices; [N, D] -> [A, D]."""
    return _ToExperts.apply(x_ND, assignments.token_A, assignments.place_NK)


def from_experts(y_AD: Tensor, weights_NK: Tensor, assignments: Assignments) -> Tensor:
    """Weighted sum of the rows of each token; [A, D] -> [N, D]. Weights of unused choices must be 0."""
    return _FromExperts.apply(y_AD, weights_NK.to(y_AD.dtype), assignments.token_A, assignments.place_NK)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_A: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, token_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> Any:
        (place_NK,) = ctx.saved_tensors
        return _sum_of_choices(grad_AD, place_NK), None, None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, weights_NK: Tensor, token_A: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(y_AD, weights_NK, token_A, place_NK)
        return _sum_of_choices(y_AD, place_NK, weights_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        y_AD, weights_NK, token_A, place_NK = ctx.saved_tensors
        grad_AD = grad_ND.index_select(0, token_A)
        # One row more than there are: that of unused choices, whose gradient is 0.
        grad_weight_A = F.pad(torch.linalg.vecdot(grad_AD, y_AD), (0, 1))
        weight_A = weights_NK.new_empty(len(y_AD) + 1)
        weight_A.scatter_(0, place_NK.reshape(-1), weights_NK.reshape(-1))
        grad_AD.mul_(weight_A[:-1].unsqueeze(1))
        return grad_AD, grad_weight_A[place_NK], None, None


def _sum_of_choices(y_AD: Tensor, place_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """Sum over the choices of each token, weighted if there are weights; [A, D] -> [N, D]. Unused ones add nothing."""
    if place_NK.numel() > len(y_AD):
        y_AD = F.pad(y_AD, (0, 0, 0, 1))
    # One kernel that reads each row once; rows that are gathered first and then summed take five times as long on CPU.
    return F.embedding_bag(place_NK, y_AD, mode="sum", per_sample_weights=weights_NK)
