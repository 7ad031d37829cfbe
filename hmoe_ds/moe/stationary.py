"""An executor for models that are larger than the memory: its experts stay where they were loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmoe_ds.moe.dispatch import from_experts, sort_by_expert, to_experts
from hmoe_ds.moe.experts import LocalExecutor
from hmoe_ds.moe.grouped import grouped_feed_forward


class StationaryExecutor(LocalExecutor):
    """Runs all experts of a layer in this process, for inference.

    They stay where they are, such as in a mapped file, when the model goes to another device or dtype. Those that have
    atoms are copied there one after the other.
    """

    def _apply(self, fn: object, recurse: bool = True) -> nn.Module:
        return self

    def forward(self, x_ND: Tensor, choices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, nothing dropped; [N, D] -> [N, D]."""
        assignments = sort_by_expert(choices_NK, self._router)
        x_AD = to_experts(x_ND, assignments)
        parts = [
            self._run(expert, part_AD)
            for expert, part_AD in enumerate(x_AD.split(assignments.counts_E.tolist()))
            if len(part_AD)
        ]
        return from_experts(torch.cat(parts) if parts else x_AD, weights_NK, assignments)

    def _run(self, expert: int, x_AD: Tensor) -> Tensor:
        weights = (self.experts.w1, self.experts.w2, self.experts.w3)
        copies = (weight[expert : expert + 1].to(x_AD.device, x_AD.dtype) for weight in weights)
        return grouped_feed_forward(x_AD, torch.tensor([len(x_AD)], device=x_AD.device), *copies)
