"""Loss-free load balancing: a bias that only choosing sees, moved once per optimizer step.

Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.gate import AtomRouting, ScaffoldRouting


class RouterLoad(NamedTuple):
    """What the gates sent where; entries add up over slices and ranks. float64, so that counts stay exact.

    Attributes:
        molecules_G: molecules whose top group is g.
        atoms_G: atoms of the molecules that were given group g.
        atoms_LE: atoms that chose expert e of H-MoE layer l.
        chosen_p: sum over molecules of the probability of their chosen groups.
    """

    molecules_G: Tensor
    atoms_G: Tensor
    atoms_LE: Tensor
    chosen_p: Tensor


@torch.no_grad()
def measure_load(
    scaffold: ScaffoldRouting, atoms: Sequence[AtomRouting], molecule_N: Tensor, router: RouterConfig
) -> RouterLoad:
    """Count where molecules and atoms were sent."""
    groups_NC = scaffold.groups_BC[molecule_N]
    experts = [torch.bincount(routing.choices_NK.flatten(), minlength=router.experts) for routing in atoms]
    return RouterLoad(
        molecules_G=torch.bincount(scaffold.groups_BC[:, 0], minlength=router.groups).double(),
        atoms_G=torch.bincount(groups_NC.flatten(), minlength=router.groups).double(),
        atoms_LE=torch.stack(experts).double(),
        chosen_p=scaffold.log_p_BG.gather(1, scaffold.groups_BC).exp().sum().double(),
    )


@torch.no_grad()
def update_route_bias(route_bias: Tensor, load: Tensor, rate: float) -> None:
    """Raise the bias of what is loaded below the mean and lower the others', by `rate`, keeping the mean at zero.

    Args:
        route_bias: one bias per group or expert; changed in place.
        load: atoms per group or expert over the global batch.
        rate: step size; 0 leaves the bias alone.
    """
    if rate:
        route_bias += rate * torch.sign(load.mean() - load).to(route_bias.dtype)
        route_bias -= route_bias.mean()
