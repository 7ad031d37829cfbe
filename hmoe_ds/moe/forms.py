"""Forms of the hierarchical gate: how the scaffold level and the atom level together weigh the experts of an atom.

With s_m = log p_m of the scaffold level, t_i the logits of the atom level, g(e) the group of expert e::

    hard      experts of the chosen groups:   log w_ie = log p_m,g(e) + log softmax(t_i over the experts of g(e))
    soft      all experts:                    log w_ie = log softmax(t_i + lambda * s_m,g(e))
    flat      all experts:                    log w_ie = log softmax(t_i)
    additive  the atom's own pool, which all groups share: log w_ie = log softmax(t_i over the pool). The first expert
              of each group is not in the pool: molecules choose these, scaffold_experts.

`hard` is the paper's reading, `soft` and `additive` keep what atoms learn common to all groups, `flat` is the usual
mixture of experts, which knows no scaffolds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hmoe_ds.config import RouterConfig


class ScaffoldRouting(NamedTuple):
    """The scaffold gate's decision for B molecules.

    Attributes:
        u_BP: unit routing embedding.
        log_p_BG: log-probability of each group.
        groups_BC: the C chosen groups, the first one the top choice.
        biased_BG: log-probability of each group with the balance bias, for choosing only: without gradient.
        z_B: squared log-partition of the logits.
        readout_BD: what the gate sees of a molecule: the mean state of its scaffold atoms, fp32 or wider.
    """

    u_BP: Tensor
    log_p_BG: Tensor
    groups_BC: Tensor
    biased_BG: Tensor
    z_B: Tensor
    readout_BD: Tensor


class Candidates(NamedTuple):
    """The M experts among which each atom chooses.

    Attributes:
        expert_NM: their global ids.
        log_w_NM: their weights, as logarithms, without any bias.
        biased_NM: the same with the balance bias of groups, for choosing only: without gradient.
    """

    expert_NM: Tensor
    log_w_NM: Tensor
    biased_NM: Tensor


def candidates(
    logits_NE: Tensor, routing: ScaffoldRouting, molecule_N: Tensor, router: RouterConfig, guidance: float
) -> Candidates:
    """The experts that each atom may choose, and their weights, by the form of the router; `guidance` is lambda."""
    per_group = router.experts // router.groups
    match router.form:
        case "hard":
            return _hard(logits_NE, routing, molecule_N, per_group)
        case "soft":
            log_p_NE = routing.log_p_BG.repeat_interleave(per_group, dim=1)[molecule_N]
            biased_NE = routing.biased_BG.repeat_interleave(per_group, dim=1)[molecule_N]
            log_w_NE = (logits_NE + guidance * log_p_NE).log_softmax(dim=1)
            choice_NE = (logits_NE.detach() + guidance * biased_NE).log_softmax(dim=1)
            return Candidates(_all_experts(logits_NE), log_w_NE, choice_NE)
        case "flat":
            log_w_NE = logits_NE.log_softmax(dim=1)
            return Candidates(_all_experts(logits_NE), log_w_NE, log_w_NE.detach())
        case "additive":
            log_w_NM = pool(logits_NE, router).log_softmax(dim=1)
            return Candidates(pool(_all_experts(logits_NE), router), log_w_NM, log_w_NM.detach())


def scaffold_experts(routing: ScaffoldRouting, molecule_N: Tensor, router: RouterConfig) -> tuple[Tensor, Tensor]:
    """What all atoms of a molecule pass in the additive form: experts [N, C] of its groups, and their weights p."""
    groups_NC = routing.groups_BC[molecule_N]
    return groups_NC * (router.experts // router.groups), routing.log_p_BG[molecule_N].gather(1, groups_NC).exp()


def pool(x_NE: Tensor, router: RouterConfig) -> Tensor:
    """Of the columns of all experts those of the pool of the form `additive`: all but the first of each group."""
    return x_NE.unflatten(1, (router.groups, -1))[:, :, 1:].flatten(1)


def groups_at_random(routing: ScaffoldRouting, key_B: Tensor, router: RouterConfig) -> ScaffoldRouting:
    """Groups that a scaffold is given by lot, once and for all, in place of those that the gate chose.

    An arm to compare with. Keys are hashes, so their remainders will do.
    """
    others_C = torch.arange(router.groups_per_molecule, device=key_B.device)
    groups_BC = (key_B.unsqueeze(1) + others_C).remainder(router.groups)
    p_BG = torch.zeros_like(routing.log_p_BG).scatter(1, groups_BC, 1 / router.groups_per_molecule)
    return routing._replace(log_p_BG=p_BG.log(), groups_BC=groups_BC, biased_BG=p_BG.log())


def _hard(logits_NE: Tensor, routing: ScaffoldRouting, molecule_N: Tensor, per_group: int) -> Candidates:
    # Experts lie group-major: group g has the experts from g * per_group on.
    offset_J = torch.arange(per_group, device=logits_NE.device)
    expert_NM = (routing.groups_BC[molecule_N].unsqueeze(-1) * per_group + offset_J).flatten(1)
    # Of the chosen groups alone: with many groups, to normalise all would take a third of a step.
    log_q_NCJ = logits_NE.gather(1, expert_NM).unflatten(1, (-1, per_group)).log_softmax(dim=-1)
    log_p_BC = routing.log_p_BG.gather(1, routing.groups_BC)
    log_w_NM = (log_p_BC[molecule_N].unsqueeze(-1) + log_q_NCJ).flatten(1)
    # The groups are chosen already, so their biases have had their say.
    return Candidates(expert_NM, log_w_NM, log_w_NM.detach())


def _all_experts(logits_NE: Tensor) -> Tensor:
    return torch.arange(logits_NE.shape[1], device=logits_NE.device).expand_as(logits_NE)
