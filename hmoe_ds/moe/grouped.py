"""Feed-forwards of several experts on rows that lie expert by expert: `w2(silu(w1 x) * w3 x)` (SwiGLU; Shazeer, 2020).

Expert e has the rows from `ends_E[e - 1]` to `ends_E[e]`. The matrix products are one call for all experts where that
is of use (`GroupedProducts`), or one after the other into one result (`LoopedProducts`); all else is done to all
rows at once. Gradients are first derivatives only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_feed_forward(x_AD: Tensor, ends_E: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Tensor:
    """Every expert on its rows; [A, D] -> [A, D]. An expert without rows gets a gradient of zeros."""
    grouped = _has_grouped_kernel(x_AD, w1_EFD, w2_EDF, w3_EFD)
    products = GroupedProducts(ends_E) if grouped else LoopedProducts(ends_E)
    return feed_forward_by(products, x_AD, w1_EFD, w2_EDF, w3_EFD)


def feed_forward_by(products: Products, x_AD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Tensor:
    """`grouped_feed_forward` with the matrix products of `products`."""
    return _FeedForward.apply(products, x_AD, w1_EFD, w2_EDF, w3_EFD)


def _has_grouped_kernel(x_AD: Tensor, *weights: Tensor) -> bool:
    """Whether torch has a grouped matrix product for these: of some dtypes, with rows that are, and begin at, whole 16
    bytes.

    Of GPUs, on Hopper alone. On older ones torch loops over experts itself, and has the host wait for their sizes in
    each product (pytorch issue 186620); on Blackwell an expert without rows is reported to get gradients that are not 0
    (issue 172439).
    """
    if x_AD.is_cuda and torch.cuda.get_device_capability(x_AD.device)[0] != 9:
        return False
    dtypes = (torch.bfloat16,) if x_AD.is_cuda else (torch.bfloat16, torch.float32)
    row_bytes = [size * x_AD.element_size() for size in weights[0].shape[1:]]
    aligned = not any(value % 16 for value in (*row_bytes, *(values.data_ptr() for values in (x_AD, *weights))))
    return x_AD.dtype in dtypes and aligned and x_AD.shape[0] > 0 and hasattr(F, "grouped_mm")  # since torch 2.10


def _grouped_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[-1]


# For torch's FlopCounterMode, as its `custom_mapping`: it does not know the grouped product.
FLOP_FORMULAS = {torch.ops.aten._grouped_mm: _grouped_flops} if hasattr(torch.ops.aten, "_grouped_mm") else {}


class Products(Protocol):
    """Matrix products of A rows with the weights of their experts; each has I inputs and O outputs."""

    def forward(self, x_AI: Tensor, w_EOI: Tensor) -> Tensor:
        """`w_e x` of each row; -> [A, O]"""

    def to_inputs(self, grads: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Sum over pairs of gradients [A, O] and weights [E, O, I] of `w_e^T g`; -> [A, I]"""

    def to_weights(self, g_AO: Tensor, x_AI: Tensor) -> Tensor:
        """Sum over an expert's rows of `g x^T`; -> [E, O, I]"""


class GroupedProducts:
    """By torch's grouped matrix product."""

    def __init__(self, ends_E: Tensor) -> None:
        self._ends_E = ends_E.to(torch.int32)

    def forward(self, x_AI: Tensor, w_EOI: Tensor) -> Tensor:
        return F.grouped_mm(x_AI, w_EOI.transpose(1, 2), offs=self._ends_E)

    def to_inputs(self, grads: list[tuple[Tensor, Tensor]]) -> Tensor:
        first_AI, *others = (F.grouped_mm(g_AO, w_EOI, offs=self._ends_E) for g_AO, w_EOI in grads)
        for other_AI in others:
            first_AI += other_AI
        return first_AI

    def to_weights(self, g_AO: Tensor, x_AI: Tensor) -> Tensor:
        return F.grouped_mm(g_AO.t(), x_AI, offs=self._ends_E)


class LoopedProducts:
    """Expert by expert. Results are written in place: nothing is concatenated."""

    def __init__(self, ends_E: Tensor) -> None:
        self._counts: list[int] = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()

    def forward(self, x_AI: Tensor, w_EOI: Tensor) -> Tensor:
        y_AO = x_AI.new_empty(len(x_AI), w_EOI.shape[1])
        for x_I, w_OI, y_O in zip(*self._split(x_AI), w_EOI, *self._split(y_AO), strict=True):
            torch.mm(x_I, w_OI.t(), out=y_O)
        return y_AO

    def to_inputs(self, grads: list[tuple[Tensor, Tensor]]) -> Tensor:
        (g_AO, w_EOI), *others = grads
        x_AI = g_AO.new_empty(len(g_AO), w_EOI.shape[2])
        for g_O, w_OI, x_I in zip(*self._split(g_AO), w_EOI, *self._split(x_AI), strict=True):
            torch.mm(g_O, w_OI, out=x_I)
        for g_AO, w_EOI in others:
            for g_O, w_OI, x_I in zip(*self._split(g_AO), w_EOI, *self._split(x_AI), strict=True):
                torch.addmm(x_I, g_O, w_OI, out=x_I)  # `addmm_` would be the same, but torch does not count its FLOPs
        return x_AI

    def to_weights(self, g_AO: Tensor, x_AI: Tensor) -> Tensor:
        w_EOI = g_AO.new_empty(len(self._counts), g_AO.shape[1], x_AI.shape[1])
        for g_O, x_I, w_OI in zip(*self._split(g_AO, x_AI), w_EOI, strict=True):
            torch.mm(g_O.t(), x_I, out=w_OI)
        return w_EOI

    def _split(self, *rows: Tensor) -> list[tuple[Tensor, ...]]:
        return [of_all.split(self._counts) for of_all in rows]


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, products: Products, x_AD: Tensor, w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor) -> Tensor:
        gate_AF, value_AF = products.forward(x_AD, w1_EFD), products.forward(x_AD, w3_EFD)
        active_AF = F.silu(gate_AF)
        hidden_AF = active_AF * value_AF
        ctx.products = products
        ctx.save_for_backward(x_AD, gate_AF, value_AF, active_AF, hidden_AF, w1_EFD, w2_EDF, w3_EFD)
        return products.forward(hidden_AF, w2_EDF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AD: Tensor) -> Any:
        x_AD, gate_AF, value_AF, active_AF, hidden_AF, w1_EFD, w2_EDF, w3_EFD = ctx.saved_tensors
        products, grad_AD = ctx.products, grad_AD.contiguous()
        w2_grad = products.to_weights(grad_AD, hidden_AF)
        grad_AF = products.to_inputs([(grad_AD, w2_EDF)])
        value_grad_AF = grad_AF * active_AF
        grad_AF = torch.ops.aten.silu_backward(grad_AF.mul_(value_AF), gate_AF)
        x_grad = products.to_inputs([(grad_AF, w1_EFD), (value_grad_AF, w3_EFD)])
        return None, x_grad, products.to_weights(grad_AF, x_AD), w2_grad, products.to_weights(value_grad_AF, x_AD)
