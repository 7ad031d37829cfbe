"""The benchmark of the MoE layer compares like with like: all arms send the same atoms to the same experts."""

import pytest
import torch

from benchmarks.moe_layer import STOCK, arms, scaffold_routing, seconds, tokens
from benchmarks.recorded_routing import EXPERTS, balanced_routing, recorded_routing

CPU = torch.device("cpu")


@pytest.mark.parametrize("experts", EXPERTS)
def test_balanced_routing_is_balanced_and_keeps_to_groups(experts):
    routing = balanced_routing(experts)
    assert routing.imbalance == 1
    per_group = experts // routing.groups
    assert torch.equal(routing.choices_NK // per_group, routing.group_B[routing.molecule_N].unsqueeze(1).expand(-1, 2))
    assert (routing.choices_NK[:, 0] != routing.choices_NK[:, 1]).all() or per_group == 1


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("make", [balanced_routing, recorded_routing])
def test_all_arms_choose_the_experts_that_were_recorded(make, experts):
    routing, width = make(experts), 64
    x_ND = tokens(routing, width).requires_grad_()
    compared = arms(routing, width, CPU, torch.float32)
    wanted_NK = routing.choices_NK.sort(dim=1).values
    for name in ("ours", "flat"):
        gate = compared[name].module.gate
        found = gate(x_ND, scaffold_routing(routing), routing.molecule_N).choices_NK
        assert torch.equal(found.sort(dim=1).values, wanted_NK)
    load_E = torch.bincount(routing.choices_NK.flatten(), minlength=experts)
    for name in STOCK:
        compared[name].forward(x_ND)
        assert torch.equal(compared[name].module.deepspeed_moe.exp_counts, load_E)
    for arm in compared.values():
        seconds(arm, x_ND, repeats=1)
        assert x_ND.grad.isfinite().all()
        assert all(weight.grad is not None for weight in arm.module.parameters() if weight.numel())
