"""Expert parallelism: the executor whose experts are spread over ranks, on DeepSpeed's AutoEP primitives.

The only file that touches DeepSpeed's MoE internals; they are private, hence the pinned version. The engine
recognises expert layers by `isinstance(module, AutoEPMoELayer)`, reduces their gradients over the
expert-data-parallel group and writes one checkpoint file per expert, so the executor is a subclass that keeps
the attributes those paths read and replaces routing and experts by ours.
"""

from __future__ import annotations

import deepspeed.comm as dist
import torch
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer, SplitPlan, compute_split_plan
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.dispatch import from_experts, inverse, reorder, sort_by_expert, to_experts
from hmoe_ds.moe.exchange import Traffic, exchange_rows
from hmoe_ds.moe.experts import Executor, Experts


class ExpertParallelExecutor(AutoEPMoELayer):
    """Runs the experts of a layer on the `ep_size` ranks that hold them; same result as `LocalExecutor`.

    Experts lie in order of their global id: rank r of an expert-parallel group holds the r-th contiguous part,
    so a group of experts is on one rank whenever `ep_size` divides the number of groups.
    Dispatch is dropless: sort by expert, all-to-all-v, experts, all-to-all-v back, weighted sum.

    Args:
        router: number and size of the experts, over all ranks.
        hidden_size: width D.
        seed: of the initialisation.
        layer: number of the layer's block among the upper blocks, from 1.
        ep_size: ranks that share the experts; torch.distributed must be initialised.
        traffic: counts what leaves this rank.
    """

    def __init__(
        self, router: RouterConfig, hidden_size: int, seed: int, layer: int, ep_size: int, traffic: Traffic
    ) -> None:
        nn.Module.__init__(self)  # AutoEPMoELayer.__init__ converts a Hugging Face block; there is none here.
        self._router, self._traffic = router, traffic
        self.num_experts, self.ep_size = router.experts, ep_size
        self.num_local_experts = router.experts // ep_size
        self.ep_rank = dist.get_rank() % ep_size
        self.hidden_size, self.model_family = hidden_size, "hmoe_ds"
        self.ep_group_name = f"ep_size_{ep_size}"
        self.ep_group: ProcessGroup | None = None  # the engine sets it
        self.tp_group = self.folding_group_handles = None
        self.combine_impl = self.comm_backend = "comm"
        self.load_balance_coeff = None
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            router.experts, self.num_local_experts, ep_size
        )
        first = self.ep_rank * self.num_local_experts
        self.experts = Experts(
            self.num_local_experts, hidden_size, router.expert_size, seed, layer, first, router.max_received
        )
        for weight in self.experts.parameters():
            self._mark(weight)

    def forward(self, x_ND: Tensor, choices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, wherever they are; [N, D] -> [N, D]."""
        assignments = sort_by_expert(choices_NK, self._router)
        with self._traffic.clock(x_ND.device):
            plan = compute_split_plan(
                choices_NK,
                self.num_experts,
                self.ep_size,
                self.num_local_experts,
                self.ep_group,
                assignments.counts_E,
            )
        x_AD = to_experts(x_ND, assignments)
        if self.ep_group is not None and self.ep_size > 1:
            # The plan told every rank how many rows come for each of its experts.
            self._traffic.count(8 * self.num_local_experts, [1] * self.ep_size, self.ep_rank)
            (x_AD,) = exchange_rows([x_AD], self.ep_group, self._traffic, plan.input_splits, plan.output_splits)
        y_AD = self._apply_local_experts(x_AD, plan)
        if self.ep_group is not None and self.ep_size > 1:
            (y_AD,) = exchange_rows([y_AD], self.ep_group, self._traffic, plan.output_splits, plan.input_splits)
        return from_experts(y_AD, weights_NK, assignments)

    def _apply_local_experts(self, x_AD: Tensor, plan: SplitPlan) -> Tensor:
        """Received rows lie by (source rank, expert); experts want them by (expert, source rank)."""
        counts_RE = plan.local_counts_by_source
        if self.ep_size == 1:
            return self.experts(x_AD, counts_RE[0])
        expert_A = torch.arange(self.num_local_experts, device=x_AD.device).repeat(self.ep_size)
        # Without the size, the host would wait for the rows to have come.
        expert_A = expert_A.repeat_interleave(counts_RE.reshape(-1), output_size=len(x_AD))
        order_A = torch.argsort(expert_A, stable=True)
        place_A = inverse(order_A)
        y_AD = self.experts(reorder(x_AD, order_A, place_A), counts_RE.sum(dim=0))
        return reorder(y_AD, place_A, order_A)

    def _mark(self, weight: nn.Parameter) -> None:
        """Tell the engine, ZeRO and the checkpoint writer that `weight` is a slice of the layer's experts."""
        logical_shape = [self.num_experts, *weight.shape[1:]]
        affine_map = autoep_placement_to_affine_map(self.expert_placement_descriptor, logical_shape)
        meta = {
            AUTOEP_EXPERT_PLACEMENT: self.expert_placement_descriptor,
            AFFINE_MAP: affine_map.to_dict(),
            AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
            AUTOEP_PARAM_EP_RANK: self.ep_rank,
            AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(self.expert_placement_descriptor, self.ep_rank)),
        }
        marks = {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.ep_group_name,
            DS_AUTOEP_UC_META: meta,
        }
        for name, value in marks.items():
            setattr(weight, name, value)


def expert_parallel(ep_size: int, traffic: Traffic) -> Executor:
    """Executor factory for `HMoEModel`: experts spread over `ep_size` ranks; `traffic` counts what leaves this one."""

    def make(router: RouterConfig, hidden_size: int, seed: int, layer: int) -> nn.Module:
        return ExpertParallelExecutor(router, hidden_size, seed, layer, ep_size, traffic)

    return make


def expert_group(ep_size: int) -> ProcessGroup:
    """The ranks that share the experts with this one; an engine with expert-parallel layers must have been made."""
    return groups._get_expert_parallel_group(f"ep_size_{ep_size}")
