"""The hierarchical gate: a molecule's scaffold chooses groups of experts, its atoms choose experts among them.

Scaffold level, once per molecule m, from atom states h below the upper blocks::

    z_m = mean of h_i over scaffold atoms (all atoms when acyclic)
    u_m = MLP(z_m) / |MLP(z_m)|,   s_mg = <u_m, c_g> / tau with unit c_g,   p_m = softmax(s_m)
    chosen: the top groups_per_molecule of <u_m, c_g> + b_g; with block_bonus the others after the first get this
    bonus if they are in its block of neighbouring groups, so that fewer ranks have a molecule's experts
    tau falls in the course of a routing curriculum

Atom level, in each H-MoE layer::

    t_ie = <W h_i, v_e>,   w_ie by the form of the gate (forms.py), such as p_mg(e) * softmax(t_i over g's experts)
    chosen: the top experts_per_atom of log w_ie + b'_e; with top_p no more of them than it takes for their weights
    to reach this share of the weights of all candidates

The biases b and b' balance the load (loss-free balancing; Wang et al., 2024). They take part in choosing only;
weights never contain them and are never renormalised over the chosen groups, since with one group that would
cut the gradient of the scaffold gate. A routing curriculum fades the atom level into the weights: they are those of
a * t_i, with a share a that grows from 0 (the atom has no say) to 1. Choices always take the whole t_i, so they do not
tie. Of the form `soft` it also moves lambda, for weights and choices alike. Routing is computed in fp32 or wider
whatever the model's dtype.

Under dynamic allocation experts split (`slots.py`). Then all of the above is of families of experts, and an atom goes
to one expert of each family that it chose.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmoe_ds.config import RouterConfig
from hmoe_ds.data.batch import sum_by_molecule
from hmoe_ds.moe.forms import Candidates, ScaffoldRouting, candidates, scaffold_experts
from hmoe_ds.moe.slots import ExpertSlots
from hmoe_ds.moe.wide import WideLayerNorm, WideLinear, wide


class RoutingStage(NamedTuple):
    """How far a routing curriculum has come.

    Attributes:
        atom_share: share a of the atom level in the weights.
        temperature: tau; None for `router.temperature`.
        guidance: lambda of the form `soft`; None for `router.guidance`.
    """

    atom_share: float = 1.0
    temperature: float | None = None
    guidance: float | None = None


FINAL_STAGE = RoutingStage()


class AtomRouting(NamedTuple):
    """The atom gate's decision for N atoms of one layer.

    Attributes:
        choices_NK: global ids of the chosen experts; E, the number of experts, where `top_p` left a choice unused.
        weights_NK: their weights w; 0 where unused.
        candidates: the experts that could be chosen.
        z_N: squared log-partition of the logits.
        squares_2: sums of squares of the routed output and of the dense one beside it, when the layer has computed them
            (`layer.py`); without gradient.
    """

    choices_NK: Tensor
    weights_NK: Tensor
    candidates: Candidates
    z_N: Tensor
    squares_2: Tensor


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
        self._router = router

    def forward(
        self,
        h_ND: Tensor,
        molecule_N: Tensor,
        scaffold_mask_N: Tensor,
        num_molecules: int,
        stage: RoutingStage = FINAL_STAGE,
    ) -> ScaffoldRouting:
        """Route B molecules by the mean state of their scaffold atoms."""
        return self.route(scaffold_mean(h_ND, molecule_N, scaffold_mask_N, num_molecules), stage)

    def route(self, z_BD: Tensor, stage: RoutingStage = FINAL_STAGE) -> ScaffoldRouting:
        """Route B molecules by their scaffold readouts."""
        temperature = stage.temperature or self._router.temperature
        u_BP = F.normalize(self.project(F.silu(self.hidden(self.norm(z_BD)))), dim=-1)
        cosine_BG = u_BP @ F.normalize(wide(self.centers), dim=-1).t()
        logits_BG = cosine_BG / temperature
        biased_BG = (cosine_BG.detach() + self.route_bias) / temperature
        return ScaffoldRouting(
            u_BP=u_BP,
            log_p_BG=logits_BG.log_softmax(dim=-1),
            groups_BC=self._choose(biased_BG, temperature),
            biased_BG=biased_BG.log_softmax(dim=-1),
            z_B=logits_BG.logsumexp(dim=-1).square(),
            readout_BD=z_BD,
        )

    def _choose(self, biased_BG: Tensor, temperature: float) -> Tensor:
        """The chosen groups of each molecule, [B, C], the first one the top choice."""
        router = self._router
        if router.block_bonus:
            block_G = torch.arange(router.groups, device=biased_BG.device) * router.group_blocks // router.groups
            # The best one is in that block, so it, or one as good, stays the first.
            near_BG = block_G == block_G[biased_BG.argmax(dim=-1, keepdim=True)]
            biased_BG = biased_BG + router.block_bonus / temperature * near_BG
        return biased_BG.topk(router.groups_per_molecule, dim=-1).indices


class AtomGate(nn.Module):
    """Chooses experts for each atom among the groups that its molecule was given.

    Args:
        hidden_size: width D of atom states.
        router: sizes.

    Attributes:
        slots: which experts live, and their families; None when all live for good.
    """

    route_bias: Tensor

    def __init__(self, hidden_size: int, router: RouterConfig) -> None:
        super().__init__()
        self.project = WideLinear(hidden_size, router.gate_size, bias=False)
        self.keys = nn.Parameter(torch.randn(router.experts, router.gate_size) / math.sqrt(router.gate_size))
        self.register_buffer("route_bias", torch.zeros(router.experts))
        self.slots = ExpertSlots(router) if router.experts_at_start else None
        self._router = router

    def forward(
        self, x_ND: Tensor, routing: ScaffoldRouting, molecule_N: Tensor, stage: RoutingStage = FINAL_STAGE
    ) -> AtomRouting:
        """Route N atoms; `molecule_N` says whose scaffold routing each atom has."""
        router = self._router
        key_NP = self.project(x_ND)
        logits_NE = key_NP @ wide(self.keys).t()
        guidance = router.guidance if stage.guidance is None else stage.guidance
        among = self._candidates(logits_NE, routing, molecule_N, guidance)
        log_w_NM = among.log_w_NM
        if stage.atom_share < 1:
            log_w_NM = self._candidates(stage.atom_share * logits_NE, routing, molecule_N, guidance).log_w_NM
        fixed = router.groups_per_molecule if router.form == "additive" else 0
        choices_NK, weights_NK = self._choose(among, log_w_NM, router.experts_per_atom - fixed)
        if fixed:
            fixed_NC, p_NC = scaffold_experts(routing, molecule_N, router)
            choices_NK, weights_NK = torch.cat([fixed_NC, choices_NK], 1), torch.cat([p_NC, weights_NK], 1)
        if self.slots is not None:
            choices_NK = self.slots.descend(choices_NK, key_NP)
            logits_NE = self.slots.families_only(logits_NE)
        z_N = logits_NE.logsumexp(dim=-1).square()
        return AtomRouting(choices_NK, weights_NK, among, z_N, squares_2=z_N.new_zeros(2))

    def _candidates(
        self, logits_NE: Tensor, routing: ScaffoldRouting, molecule_N: Tensor, guidance: float
    ) -> Candidates:
        """The experts that can be chosen; of slots only families have weights."""
        if self.slots is not None:
            logits_NE = self.slots.families_only(logits_NE)
        return candidates(logits_NE, routing, molecule_N, self._router, guidance)

    def _choose(self, among: Candidates, log_w_NM: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The experts that each atom takes, [N, count], and their weights, of `log_w_NM`."""
        biased_NM = among.biased_NM + self.route_bias[among.expert_NM]
        place_NK = biased_NM.topk(count, dim=-1).indices
        choices_NK = among.expert_NM.gather(1, place_NK)
        weights_NK = log_w_NM.gather(1, place_NK).exp()
        if self._router.top_p == 1:
            return choices_NK, weights_NK
        share_NK = (among.log_w_NM.gather(1, place_NK).exp() / among.log_w_NM.exp().sum(dim=1, keepdim=True)).detach()
        # A choice is of use as long as those before it fall short. Not `cumsum`, which is not deterministic on a GPU.
        before_KK = share_NK.new_ones(count, count).tril(-1)
        used_NK = (share_NK.unsqueeze(1) * before_KK).sum(dim=-1) < self._router.top_p
        return choices_NK.where(used_NK, self._router.experts), weights_NK.where(used_NK, 0.0)


def scaffold_mean(h_ND: Tensor, molecule_N: Tensor, scaffold_mask_N: Tensor, num_molecules: int) -> Tensor:
    """Mean state over the scaffold atoms of each molecule, over all its atoms when it has none; -> [B, D]."""
    h_ND = wide(h_ND)
    scaffold_atoms_B = sum_by_molecule(scaffold_mask_N.to(h_ND.dtype), molecule_N, num_molecules)
    acyclic_N = (scaffold_atoms_B == 0)[molecule_N]
    weight_N = (scaffold_mask_N | acyclic_N).to(h_ND.dtype)
    total_BD = sum_by_molecule(h_ND * weight_N.unsqueeze(-1), molecule_N, num_molecules)
    return total_BD / sum_by_molecule(weight_N, molecule_N, num_molecules).unsqueeze(-1)
