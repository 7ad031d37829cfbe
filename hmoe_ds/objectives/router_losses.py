"""Losses on the gates themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hmoe_ds.config import RouterConfig
from hmoe_ds.model.encoder import Encoding
from hmoe_ds.moe.balance import measure_load
from hmoe_ds.moe.gate import AtomRouting
from hmoe_ds.moe.slots import ExpertSlots
from hmoe_ds.objectives.gather import sum_over_ranks


def router_z_loss(encoding: Encoding, molecules: float | Tensor, atoms: float | Tensor) -> Tensor:
    """Mean squared log-partition of the logits of both gates, which keeps them from growing.

    Source: Zoph et al., "ST-MoE", 2022, equation 5.

    Args:
        encoding: this rank's molecules.
        molecules: molecules to average the scaffold level over.
        atoms: atoms to average the atom level over; layers are averaged too.
    """
    atom_z = sum(routing.z_N.sum() for routing in encoding.atoms) / len(encoding.atoms)
    return encoding.scaffold.z_B.sum() / molecules + atom_z / atoms


def router_balance_loss(
    encoding: Encoding,
    molecule_N: Tensor,
    router: RouterConfig,
    slots: Sequence[ExpertSlots | None],
    molecules: float | Tensor,
    atoms: float | Tensor,
) -> Tensor:
    """Auxiliary balance loss of both levels: the share of what was chosen times the mean weight, times their number.

    `G sum_g f_g P_g + mean over layers of E sum_e f_e P_e`: f is the share of the choices that fell on a group or an
    expert, over the slice and all ranks, and takes no gradient; P is the mean weight. Balanced, the first term is 1 and
    the second the mean sum of an atom's weights over its candidates. Where experts split, E is the number of those that
    live, and f_e the share of a family over its slots.
    Source: Fedus et al., "Switch Transformers", 2022, equation 4.

    Args:
        encoding: this rank's molecules.
        molecule_N: the molecule of each atom.
        router: sizes.
        slots: of each H-MoE layer; None where all experts live for good.
        molecules: molecules to average the scaffold level over.
        atoms: atoms to average the atom level over.
    """
    load = measure_load(encoding.scaffold, encoding.atoms, molecule_N, router)
    molecules_G, atoms_LE = sum_over_ranks([load.molecules_G, load.atoms_LE])
    p_G = encoding.scaffold.log_p_BG.exp().sum(dim=0) / molecules
    total = router.groups * (_shares(molecules_G, molecules_G.sum()) * p_G).sum()
    for routing, layer_slots, atoms_E in zip(encoding.atoms, slots, atoms_LE, strict=True):
        among = routing.candidates
        w_E = among.log_w_NM.new_zeros(router.experts).index_add(
            0, among.expert_NM.flatten(), among.log_w_NM.exp().flatten()
        )
        experts: Tensor | int = router.experts
        load_E = atoms_E
        if layer_slots is not None:
            load_E, experts = layer_slots.family_load(atoms_E).per_slot_E, layer_slots.live_E.sum()
        total = total + experts * (_shares(load_E, atoms_E.sum()) * w_E).sum() / atoms / len(encoding.atoms)
    return total


def choice_entropy(encoding: Encoding, atoms: float | Tensor) -> Tensor:
    """Mean entropy, in nats, of the atoms' weights as shares of their candidates' weights; layers are averaged.

    What `top_p` needs: a gate whose weights are nearly equal takes every expert.

    Args:
        encoding: this rank's molecules.
        atoms: atoms to average over.
    """
    return torch.stack([_entropy(routing) for routing in encoding.atoms]).mean() / atoms


def _entropy(routing: AtomRouting) -> Tensor:
    log_share_NM = routing.candidates.log_w_NM.log_softmax(dim=1)
    # Experts of groups that were not given have none, and 0 log 0 is 0.
    return -(log_share_NM.exp() * log_share_NM.masked_fill(log_share_NM.isneginf(), 0)).sum()


def _shares(counts: Tensor, total: Tensor) -> Tensor:
    return (counts / total.clamp(min=1)).float()
