"""Loss-free load balancing: a bias that only choosing sees, moved once per optimizer step.

Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.dispatch import count
from hmoe_ds.moe.forms import ScaffoldRouting, pool
from hmoe_ds.moe.gate import AtomRouting
from hmoe_ds.moe.slots import ExpertSlots


class RouterLoad(NamedTuple):
    """What the gates sent where; entries add up over slices and ranks. float64, so that counts stay exact.

    Attributes:
        molecules_G: molecules whose top group is g.
        atoms_G: atoms of the molecules that were given group g; in the form `soft`, where groups are not chosen, the
            choices of its experts.
        atoms_LE: atoms that chose expert e of H-MoE layer l.
        chosen_p: sum over molecules of the probability of their chosen groups.
        squares_L2: sums of squares of the routed output of each layer and of the dense one beside it.
    """

    molecules_G: Tensor
    atoms_G: Tensor
    atoms_LE: Tensor
    chosen_p: Tensor
    squares_L2: Tensor


@torch.no_grad()
def measure_load(
    scaffold: ScaffoldRouting, atoms: Sequence[AtomRouting], molecule_N: Tensor, router: RouterConfig
) -> RouterLoad:
    """Count where molecules and atoms were sent."""
    atoms_LE = torch.stack([count(routing.choices_NK, router.experts + 1)[: router.experts] for routing in atoms])
    if router.form == "soft":
        atoms_G = atoms_LE.sum(dim=0).unflatten(0, (router.groups, -1)).sum(dim=1)
    else:
        atoms_G = count(scaffold.groups_BC[molecule_N], router.groups)
    return RouterLoad(
        molecules_G=count(scaffold.groups_BC[:, 0], router.groups).double(),
        atoms_G=atoms_G.double(),
        atoms_LE=atoms_LE.double(),
        chosen_p=scaffold.log_p_BG.gather(1, scaffold.groups_BC).exp().sum().double(),
        squares_L2=torch.stack([routing.squares_2 for routing in atoms]).double(),
    )


def chosen_by_atoms(atoms_LE: Tensor, live_L: Tensor | None, router: RouterConfig) -> tuple[Tensor, Tensor | None]:
    """Of `RouterLoad.atoms_LE` the experts that atoms choose, [L, M], and how many of these live, [L].

    All of them but in `additive`, where molecules choose the scaffolds' experts; `live_L`: None when all live for good.
    """
    if router.form != "additive":
        return atoms_LE, live_L
    return pool(atoms_LE, router), None if live_L is None else live_L - router.groups


@torch.no_grad()
def update_route_bias(route_bias: Tensor, load: Tensor, rate: float, dim: int | None = None) -> None:
    """Raise the bias of what is loaded below the mean and lower the others', by `rate`, keeping the mean at zero.

    Args:
        route_bias: one bias per group or expert; changed in place.
        load: atoms per group or expert over the global batch.
        rate: step size; 0 leaves the bias alone.
        dim: over which means are taken; None for all. What shares a mean must compete for the same atoms.
    """
    if rate:
        route_bias += rate * torch.sign(load.mean(dim=dim, keepdim=True) - load).to(route_bias.dtype)
        route_bias -= route_bias.mean(dim=dim, keepdim=True)


def update_expert_bias(route_bias: Tensor, load_E: Tensor, router: RouterConfig) -> None:
    """`update_route_bias` for the experts of one layer, by what each form has compete for the same atoms.

    In `hard` these are the experts of a group, as the scaffold gate decides how many atoms a group has; in `additive`
    all but the scaffolds' experts, which atoms do not choose and which keep a bias of 0; else all.
    """
    rate = router.expert_balance_rate
    bias_GJ, load_GJ = route_bias.view(router.groups, -1), load_E.view(router.groups, -1)
    match router.form:
        case "hard":
            update_route_bias(bias_GJ, load_GJ, rate, dim=1)
        case "additive":
            update_route_bias(bias_GJ[:, 1:], load_GJ[:, 1:], rate)
        case "soft" | "flat":
            update_route_bias(route_bias, load_E, rate)


@torch.no_grad()
def update_family_bias(route_bias: Tensor, slots: ExpertSlots, load_E: Tensor, rate: float) -> None:
    """`update_route_bias` where experts split: each family has a bias, by its load per slot beside that of its pool.

    So a family that split comes to take more. The thresholds of the splits move by the same rule: that of one whose new
    side has more load per slot rises.

    Args:
        route_bias: one bias per slot, of which those of roots count; changed in place.
        slots: their thresholds are changed in place.
        load_E: atoms per slot over the global batch.
        rate: step size, of biases and of thresholds.
    """
    root_E, load = slots.root_E, slots.family_load(load_E)
    route_bias += rate * (torch.sign(load.mean_E - load.per_slot_E) * root_E).to(route_bias.dtype)
    route_bias -= root_E * slots.pool_mean(route_bias, root_E)
    slots.threshold_E += rate * torch.sign(load.excess_E).to(route_bias.dtype)
    slots.threshold_E.clamp_(-1, 1)  # they are compared with cosines
