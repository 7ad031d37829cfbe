"""The H-MoE feed-forward layer: atom gate, experts behind an executor, shared expert."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.experts import Executor, GatedFeedForward
from hmoe_ds.moe.forms import ScaffoldRouting
from hmoe_ds.moe.gate import FINAL_STAGE, AtomGate, AtomRouting, RoutingStage


class HMoELayer(nn.Module):
    """`y_i = shared(x_i) + route_scale * sum_e w_ie expert_e(x_i)`; nothing is dropped.

    Args:
        hidden_size: width D.
        router: sizes of gate and experts.
        seed: of the experts' initialisation.
        layer: number of its block among the upper blocks, from 1.
        executor: makes what runs the experts, here or spread over ranks.
    """

    route_scale: Tensor

    def __init__(self, hidden_size: int, router: RouterConfig, seed: int, layer: int, executor: Executor) -> None:
        super().__init__()
        self.gate = AtomGate(hidden_size, router)
        self.executor = executor(router, hidden_size, seed=seed, layer=layer)
        self.shared = GatedFeedForward(hidden_size, router.shared_size) if router.shared_size else None
        self.register_buffer("route_scale", torch.ones(()))

    def forward(
        self, x_ND: Tensor, routing: ScaffoldRouting, molecule_N: Tensor, stage: RoutingStage = FINAL_STAGE
    ) -> tuple[Tensor, AtomRouting]:
        """[N, D] -> [N, D] and the atom gate's decision."""
        atom_routing = self.gate(x_ND, routing, molecule_N, stage)
        y_ND = self.route_scale.to(x_ND.dtype) * self.executor(x_ND, atom_routing.choices_NK, atom_routing.weights_NK)
        # Without a shared expert the input is the measure: it is normed, as that of a dense feed-forward.
        dense_ND = x_ND if self.shared is None else self.shared(x_ND)
        squares_2 = torch.stack([_sum_of_squares(y_ND), _sum_of_squares(dense_ND)])
        if self.shared is not None:
            y_ND = y_ND + dense_ND
        return y_ND, atom_routing._replace(squares_2=squares_2)

    @torch.no_grad()
    def calibrate(self, x_ND: Tensor, routing: ScaffoldRouting, molecule_N: Tensor) -> None:
        """Set `route_scale` so that the routed part starts with the RMS of a dense feed-forward.

        Independent experts of RMS r add up to r * sqrt(mean of sum_e w_ie^2), so no expert needs to be run.
        Without the scale the routed part starts at 2-10% of a dense layer.
        """
        weights_NK = self.gate(x_ND, routing, molecule_N).weights_NK
        self.route_scale.copy_(weights_NK.square().sum(dim=1).mean().rsqrt())


def _sum_of_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32)).square()
