"""Messages along bonds: what an atom takes from its neighbours, in one pass over the bonds.

    y_i = (1 + eps) x_i + sum over neighbours j of relu(x_j + e_ij)

the sum of the GINE convolution (Hu et al., "Strategies for Pre-training GNNs", 2020). A bond has one state for both its
directions. Neither messages nor states of directed edges are kept: the backward computes the messages again, from
what is there anyway. On the CPU both passes are one loop each, over rows that lie near each other; elsewhere they are
torch's gather and index_add.
"""

from __future__ import annotations

from typing import Any

import numba
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable


def pass_messages(x_ND: Tensor, edge_index_2M: Tensor, bond_MD: Tensor, eps: Tensor) -> Tensor:
    """y, [N, D].

    Args:
        x_ND: states of atoms.
        edge_index_2M: both directions of each bond; bond j has the directed edges 2j and 2j + 1.
        bond_MD: states of bonds, [M, D].
        eps: one number.
    """
    return _Messages.apply(x_ND, edge_index_2M, bond_MD, eps)


class _Messages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, edge_index_2M: Tensor, bond_MD: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, edge_index_2M, bond_MD, eps)
        if _is_looped(x_ND, bond_MD, eps):
            y_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
            if not _loop(*_arrays(x_ND, edge_index_2M, bond_MD, 1 + eps, y_ND)):
                least, most = (int(atom) for atom in edge_index_2M.aminmax())
                raise IndexError(f"edge_index_2M has atoms from {least} to {most}, expected 0 to {len(x_ND) - 1}")
            return y_ND
        y_ND = (1 + eps) * x_ND
        for to_M, from_M in _directions(edge_index_2M):
            y_ND.index_add_(0, to_M, (x_ND[from_M] + bond_MD).relu_())
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x_ND, edge_index_2M, bond_MD, eps = ctx.saved_tensors
        grad_ND = grad_ND.contiguous()
        grad_eps = torch.dot(grad_ND.view(-1), x_ND.reshape(-1)).view(1)
        if _is_looped(x_ND, bond_MD, eps):
            grad_x_ND, grad_bond_MD = (
                torch.empty_like(values, memory_format=torch.contiguous_format) for values in (grad_ND, bond_MD)
            )
            _loop_backward(*_arrays(x_ND, edge_index_2M, bond_MD, 1 + eps, grad_ND, grad_x_ND, grad_bond_MD))
            return grad_x_ND, None, grad_bond_MD, grad_eps
        grad_x_ND, grad_bond_MD = (1 + eps) * grad_ND, torch.zeros_like(bond_MD)
        for to_M, from_M in _directions(edge_index_2M):
            passed_MD = grad_ND[to_M].masked_fill_(x_ND[from_M] + bond_MD <= 0, 0.0)
            grad_x_ND.index_add_(0, from_M, passed_MD)
            grad_bond_MD += passed_MD
        return grad_x_ND, None, grad_bond_MD, grad_eps


def _is_looped(x_ND: Tensor, *others: Tensor) -> bool:
    alike = all(other.dtype == x_ND.dtype for other in others)
    return alike and x_ND.device.type == "cpu" and x_ND.dtype in (torch.float32, torch.float64)


def _arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    # What is written to is contiguous already: a copy of it would be lost.
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _directions(edge_index_2M: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The atoms that messages go to and come from, one way along all bonds and the other."""
    begin_M, end_M = edge_index_2M[:, ::2]
    return (begin_M, end_M), (end_M, begin_M)


@numba.njit(cache=True, nogil=True)
def _loop(x, edge_index, bond, scale, y):  # type: ignore[no-untyped-def]
    zero = x.dtype.type(0)  # a bare 0 would make all of it double precision
    for i in range(x.shape[0]):
        for d in range(x.shape[1]):
            y[i, d] = scale[0] * x[i, d]
    for b in range(bond.shape[0]):
        u, v = edge_index[0, 2 * b], edge_index[1, 2 * b]
        if min(u, v) < 0 or max(u, v) >= x.shape[0]:
            return False
        x_u, x_v, y_u, y_v, state = x[u], x[v], y[u], y[v], bond[b]
        for d in range(state.size):
            y_u[d] += max(x_v[d] + state[d], zero)
        for d in range(state.size):
            y_v[d] += max(x_u[d] + state[d], zero)
    return True


@numba.njit(cache=True, nogil=True)
def _loop_backward(x, edge_index, bond, scale, grad, grad_x, grad_bond):  # type: ignore[no-untyped-def]
    zero = x.dtype.type(0)
    for i in range(x.shape[0]):
        for d in range(x.shape[1]):
            grad_x[i, d] = scale[0] * grad[i, d]
    for b in range(bond.shape[0]):
        u, v = edge_index[0, 2 * b], edge_index[1, 2 * b]
        x_u, x_v, grad_u, grad_v, state = x[u], x[v], grad[u], grad[v], bond[b]
        grad_x_u, grad_x_v, grad_state = grad_x[u], grad_x[v], grad_bond[b]
        for d in range(state.size):
            passed = zero if x_v[d] + state[d] <= zero else grad_u[d]  # so that a NaN is passed on
            grad_x_v[d] += passed
            grad_state[d] = passed
        for d in range(state.size):
            passed = zero if x_u[d] + state[d] <= zero else grad_v[d]
            grad_x_u[d] += passed
            grad_state[d] += passed
