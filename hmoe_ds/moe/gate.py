"""The hierarchical gate: a molecule's scaffold chooses groups of experts, its atoms choose experts among them.

Scaffold level, once per molecule m, from atom states h below the upper blocks:
    z_m = mean of h_i over scaffold atoms (all atoms when acyclic)
    u_m = MLP(z_m) / |MLP(z_m)|,   s_mg = <u_m, c_g> / tau with unit c_g,   p_m = softmax(s_m)
    chosen: the top `groups_per_molecule` of <u_m, c_g> + b_g
Atom level, in each H-MoE layer:
    t_ie = <W h_i, v_e>,   q_i(.|g) = softmax of t_i over the experts of g,   w_ie = p_mg(e) * q_i(e|g)
    chosen: the top `experts_per_atom` of log w_ie + b'_e among the chosen groups

The biases b and b' balance the load (loss-free balancing; Wang et al., 2024). They take part in choosing only;
weights never contain them and are never renormalised over the chosen groups, since with one group that would
cut the gradient of the scaffold gate. Routing is computed in fp32 or wider whatever the model's dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmoe_ds.config import RouterConfig


class ScaffoldRouting(NamedTuple):
    """The scaffold gate's decision for B molecules.

    Attributes:
        u_BP: unit routing embedding.
        log_p_BG: log-probability of each group.
        groups_BC: the C chosen groups, the first one the top choice.
        z_B: squared log-partition of the logits.
    """

    u_BP: Tensor
    log_p_BG: Tensor
    groups_BC: Tensor
    z_B: Tensor


class AtomRouting(NamedTuple):
    """The atom gate's decision for N atoms of one layer.

    Attributes:
        choices_NK: global ids of the chosen experts.
        weights_NK: their weights w.
        z_N: squared log-partition of the logits.
    """

    choices_NK: Tensor
    weights_NK: Tensor
    z_N: Tensor


class WideLinear(nn.Linear):
    """`nn.Linear` that computes in fp32, or wider, whatever the dtype of its parameters and input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_wide(x), _wide(self.weight), None if self.bias is None else _wide(self.bias))


class WideLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that computes in fp32, or wider, whatever the dtype of its parameters and input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(_wide(x), self.normalized_shape, _wide(self.weight), _wide(self.bias), self.eps)


class ScaffoldGate(nn.Module):
    """Chooses groups of experts for each molecule.

    Args:
        hidden_size: width D of atom states.
        router: sizes and temperature.
    """

    route_bias: Tensor

    def __init__(self, hidden_size: int, router: RouterConfig) -> None:
        super().__init__()
        self.norm = WideLayerNorm(hidden_size)
        self.hidden = WideLinear(hidden_size, hidden_size)
        self.project = WideLinear(hidden_size, router.gate_size)
        self.centers = nn.Parameter(torch.randn(router.groups, router.gate_size))
        self.register_buffer("route_bias", torch.zeros(router.groups))
        self._groups_per_molecule = router.groups_per_molecule
        self._temperature = router.temperature

    def forward(self, h_ND: Tensor, molecule_N: Tensor, scaffold_mask_N: Tensor, num_molecules: int) -> ScaffoldRouting:
        """Route B molecules by the mean state of their scaffold atoms."""
        return self.route(scaffold_mean(h_ND, molecule_N, scaffold_mask_N, num_molecules))

    def route(self, z_BD: Tensor) -> ScaffoldRouting:
        """Route B molecules by their scaffold readouts."""
        u_BP = F.normalize(self.project(F.silu(self.hidden(self.norm(z_BD)))), dim=-1)
        cosine_BG = u_BP @ F.normalize(_wide(self.centers), dim=-1).t()
        logits_BG = cosine_BG / self._temperature
        chosen = (cosine_BG.detach() + self.route_bias).topk(self._groups_per_molecule, dim=-1)
        return ScaffoldRouting(
            u_BP=u_BP,
            log_p_BG=logits_BG.log_softmax(dim=-1),
            groups_BC=chosen.indices,
            z_B=logits_BG.logsumexp(dim=-1).square(),
        )


class AtomGate(nn.Module):
    """Chooses experts for each atom among the groups that its molecule was given.

    Args:
        hidden_size: width D of atom states.
        router: sizes.
    """

    route_bias: Tensor

    def __init__(self, hidden_size: int, router: RouterConfig) -> None:
        super().__init__()
        self.project = WideLinear(hidden_size, router.gate_size, bias=False)
        self.keys = nn.Parameter(torch.randn(router.experts, router.gate_size) / math.sqrt(router.gate_size))
        self.register_buffer("route_bias", torch.zeros(router.experts))
        self._per_group = router.experts // router.groups
        self._experts_per_atom = router.experts_per_atom

    def forward(self, x_ND: Tensor, routing: ScaffoldRouting, molecule_N: Tensor) -> AtomRouting:
        """Route N atoms; `molecule_N` says whose groups each atom may use."""
        logits_NE = self.project(x_ND) @ _wide(self.keys).t()
        groups_NC = routing.groups_BC[molecule_N]
        # Global ids of the experts an atom may use, C chosen groups of E/G experts each.
        expert_NM = self._experts_of(groups_NC)
        log_q_NGJ = logits_NE.unflatten(1, (-1, self._per_group)).log_softmax(dim=-1)
        log_p_NG = routing.log_p_BG[molecule_N]
        log_w_NM = (log_p_NG.unsqueeze(-1) + log_q_NGJ).flatten(1).gather(1, expert_NM)
        biased_NM = log_w_NM.detach() + self.route_bias[expert_NM]
        place_NK = biased_NM.topk(self._experts_per_atom, dim=-1).indices
        return AtomRouting(
            choices_NK=expert_NM.gather(1, place_NK),
            weights_NK=log_w_NM.gather(1, place_NK).exp(),
            z_N=logits_NE.logsumexp(dim=-1).square(),
        )

    def _experts_of(self, groups_NC: Tensor) -> Tensor:
        """[N, C] groups -> [N, C * E/G] global expert ids; experts lie group-major."""
        offset_J = torch.arange(self._per_group, device=groups_NC.device)
        return (groups_NC.unsqueeze(-1) * self._per_group + offset_J).flatten(1)


def scaffold_mean(h_ND: Tensor, molecule_N: Tensor, scaffold_mask_N: Tensor, num_molecules: int) -> Tensor:
    """Mean state over the scaffold atoms of each molecule, over all its atoms when it has none; -> [B, D]."""
    h_ND = _wide(h_ND)
    scaffold_atoms_B = h_ND.new_zeros(num_molecules).index_add(0, molecule_N, scaffold_mask_N.to(h_ND.dtype))
    acyclic_N = (scaffold_atoms_B == 0)[molecule_N]
    weight_N = (scaffold_mask_N | acyclic_N).to(h_ND.dtype)
    total_BD = h_ND.new_zeros(num_molecules, h_ND.shape[1]).index_add(0, molecule_N, h_ND * weight_N.unsqueeze(-1))
    count_B = h_ND.new_zeros(num_molecules).index_add(0, molecule_N, weight_N)
    return total_BD / count_B.unsqueeze(-1)


def _wide(x: Tensor) -> Tensor:
    """`x` in fp32, or wider if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
