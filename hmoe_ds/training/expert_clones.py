"""Dynamic expert allocation in a training run: loads add up, and where a split is due an expert is copied.

A copy of an expert has its weights, their fp32 master and Adam's two moments, so that it goes on as the expert would
have. Master and moments are spread over the ranks that hold the same experts; they are put together one matrix of one
layer at a time.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from hmoe_ds.config import RunConfig
from hmoe_ds.moe.allocation import Split, apply_split, plan_split, split_direction
from hmoe_ds.moe.balance import RouterLoad
from hmoe_ds.moe.deepspeed_ep import ExpertParallelExecutor

_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def split_experts(
    engine: deepspeed.DeepSpeedEngine, load: RouterLoad, config: RunConfig, step: int
) -> dict[int, Split]:
    """Let the experts split that are due, after optimizer step `step` (1-based); all ranks take part.

    Args:
        engine: its ZeRO stage is 1 or 2.
        load: of the global batch of the step.
        config: of the run; without `router.experts_at_start` nothing is done.
        step: steps done.

    Returns:
        The splits, by the number of the H-MoE layer, from 1.
    """
    router, splits = config.router, dict[int, Split]()
    if not router.experts_at_start:
        return splits
    for number, layer in enumerate(engine.module.model.encoder.moe_layers(), start=1):
        layer.gate.slots.load_E += load.atoms_LE[number - 1]
        if step % router.split_every:
            continue
        split = plan_split(layer.gate.slots, router)
        if split is not None:
            _copy_expert(layer.executor, engine.optimizer, split.parent, split.slot)
            apply_split(layer.gate, split, split_direction(config.run.seed, number, split.slot, step, router))
            splits[number] = split
        layer.gate.slots.load_E.zero_()
    return splits


def _copy_expert(executor: ExpertParallelExecutor, optimizer: Any, parent: int, slot: int) -> None:
    """Make expert `slot` a copy of expert `parent`, wherever in the expert-parallel group they are."""
    _link_moments(optimizer)
    owner, row = divmod(parent, executor.num_local_experts)
    taker, target = divmod(slot, executor.num_local_experts)
    for weight in executor.experts.parameters():
        # On all ranks, also on those that neither give nor take: their peers with the same experts may be waiting.
        states_S = _read_states(weight)
        copied = torch.stack([state[row] for state in states_S])
        dist.broadcast(copied, group=executor.ep_group, group_src=owner)
        if executor.ep_rank == taker:
            for state, value in zip(states_S, copied, strict=True):
                state[target] = value
            _write_states(weight, states_S)
            weight[target] = copied[0].to(weight.dtype)


def _read_states(weight: nn.Parameter) -> list[Tensor]:
    """Master and moments of a weight, whole; the ranks that hold the same experts read it together."""
    moments = [safe_get_full_optimizer_state(weight, name) for name in _MOMENTS]
    return [safe_get_full_fp32_param(weight), *moments]


def _write_states(weight: nn.Parameter, states_S: list[Tensor]) -> None:
    """What `_read_states` read, changed."""
    safe_set_full_fp32_param(weight, states_S[0])
    for name, moment in zip(_MOMENTS, states_S[1:], strict=True):
        safe_set_full_optimizer_state(weight, moment, name)


def _link_moments(optimizer: Any) -> None:
    # DeepSpeed 0.19.8 looks for the moments of all groups of parameters when only the first group has any, and does not
    # look again; nor after a checkpoint was loaded.
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
