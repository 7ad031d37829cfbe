"""What a loss over the whole slice needs of all ranks: their rows, with gradient, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # Collectives want equal shapes from all ranks.
        padded = rows_BD.new_zeros(max(counts), rows_BD.shape[1])
        padded[: rows_BD.shape[0]] = rows_BD
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None


def gather_rows(rows_BD: Tensor, counts: list[int]) -> Tensor:
    """Concatenate every rank's rows in rank order; the gradient flows back to the rank a row came from.

    Args:
        rows_BD: this rank's rows.
        counts: number of rows of each rank, the same list on all ranks; one entry needs no process group.
    """
    if len(counts) == 1:
        return rows_BD
    return _GatherRows.apply(rows_BD, counts)


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over all ranks, in one all-reduce and without gradient.

    Args:
        tensors: of one dtype, and of the same shapes on all ranks; one rank needs no process group.
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def gather_objects(mine: T) -> list[T]:
    """What each rank gives, in rank order, the same on all of them: plain values, on the host."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
