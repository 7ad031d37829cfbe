"""The H-MoE layer: parity with a dense feed-forward, permutations, chunking, scale at the start."""

import pytest
import torch

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.experts import (
    Experts,
    GatedFeedForward,
    LocalExecutor,
    grouped_feed_forward,
    looped_feed_forward,
)
from hmoe_ds.moe.gate import ScaffoldGate
from hmoe_ds.moe.layer import HMoELayer

D = 16


def make_layer(seed=0, **changes):
    values = {
        "groups": 4,
        "experts": 8,
        "experts_per_atom": 2,
        "expert_size": 24,
        "shared_size": 0,
        "gate_size": 8,
    }
    router = RouterConfig(**(values | changes))
    torch.manual_seed(seed)
    gate = ScaffoldGate(D, router).double()
    layer = HMoELayer(D, router, seed=seed, layer=1, executor=LocalExecutor).double()
    return gate, layer


def inputs(molecules=6, atoms=9, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(molecules * atoms, D, generator=generator, dtype=torch.float64)
    molecule_N = torch.arange(molecules).repeat_interleave(atoms)
    mask_N = torch.rand(molecules * atoms, generator=generator) < 0.5
    return x_ND, molecule_N, mask_N


def run(gate, layer, x_ND, molecule_N, mask_N):
    routing = gate(x_ND, molecule_N, mask_N, int(molecule_N.max()) + 1)
    return layer(x_ND, routing, molecule_N)


def test_one_expert_one_group_is_a_dense_feed_forward():
    gate, layer = make_layer(groups=1, experts=1, experts_per_atom=1)
    dense = GatedFeedForward(D, 24).double()
    experts = layer.executor.experts
    for name in ("w1", "w2", "w3"):
        getattr(dense, name).weight.data.copy_(getattr(experts, name).data[0])
    x_ND, molecule_N, mask_N = inputs()
    x_dense_ND = x_ND.clone().requires_grad_()
    x_ND.requires_grad_()

    y_ND, _ = run(gate, layer, x_ND, molecule_N, mask_N)
    expected_ND = dense(x_dense_ND)
    torch.testing.assert_close(y_ND, expected_ND)

    cotangent = torch.randn_like(y_ND)
    (y_ND * cotangent).sum().backward()
    (expected_ND * cotangent).sum().backward()
    torch.testing.assert_close(x_ND.grad, x_dense_ND.grad)
    for name in ("w1", "w2", "w3"):
        torch.testing.assert_close(getattr(experts, name).grad[0], getattr(dense, name).weight.grad)


def test_output_is_the_weighted_sum_of_the_chosen_experts():
    gate, layer = make_layer(shared_size=8)
    x_ND, molecule_N, mask_N = inputs()
    y_ND, routing = run(gate, layer, x_ND, molecule_N, mask_N)
    w1, w2, w3 = (getattr(layer.executor.experts, name) for name in ("w1", "w2", "w3"))
    for i in range(len(x_ND)):
        expected = layer.shared(x_ND[i])
        for e, w in zip(routing.choices_NK[i].tolist(), routing.weights_NK[i], strict=True):
            hidden = torch.nn.functional.silu(w1[e] @ x_ND[i]) * (w3[e] @ x_ND[i])
            expected = expected + layer.route_scale * w * (w2[e] @ hidden)
        torch.testing.assert_close(y_ND[i], expected)


def test_permuting_experts_inside_their_groups_changes_nothing():
    gate, layer = make_layer()
    x_ND, molecule_N, mask_N = inputs()
    before, routing = run(gate, layer, x_ND, molecule_N, mask_N)
    swap = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    for weight in (*layer.executor.experts.parameters(), layer.gate.keys):
        weight.data = weight.data[swap]
    after, swapped = run(gate, layer, x_ND, molecule_N, mask_N)
    torch.testing.assert_close(before, after)
    assert torch.equal(swap[routing.choices_NK], swapped.choices_NK)


def test_permuting_groups_changes_nothing():
    gate, layer = make_layer()
    x_ND, molecule_N, mask_N = inputs()
    before, _ = run(gate, layer, x_ND, molecule_N, mask_N)
    groups = torch.tensor([2, 0, 3, 1])
    experts = (groups.unsqueeze(1) * 2 + torch.arange(2)).flatten()
    gate.centers.data = gate.centers.data[groups]
    for weight in (*layer.executor.experts.parameters(), layer.gate.keys):
        weight.data = weight.data[experts]
    after, _ = run(gate, layer, x_ND, molecule_N, mask_N)
    torch.testing.assert_close(before, after)


def test_computing_experts_in_chunks_changes_nothing():
    gate, layer = make_layer()
    x_ND, molecule_N, mask_N = inputs(molecules=20)
    whole, _ = run(gate, layer, x_ND.requires_grad_(), molecule_N, mask_N)
    whole.square().sum().backward()
    gradients = [weight.grad.clone() for weight in layer.parameters()]
    layer.zero_grad()
    layer.executor.experts._max_rows = 7
    chunked, _ = run(gate, layer, x_ND, molecule_N, mask_N)
    chunked.square().sum().backward()
    torch.testing.assert_close(whole, chunked)
    for weight, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


@pytest.mark.parametrize("first", [0, 3])
def test_an_expert_is_initialised_from_its_global_id_alone(first):
    from hmoe_ds.moe.experts import Experts

    whole = Experts(8, D, 24, seed=5, layer=2)
    part = Experts(4, D, 24, seed=5, layer=2, first=first)
    for name in ("w1", "w2", "w3"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[first : first + 4])
    other = Experts(4, D, 24, seed=5, layer=1, first=first)
    assert not torch.equal(other.w1, part.w1)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="needs torch 2.10")
@pytest.mark.parametrize("counts", [[5, 0, 11, 1], [0, 0, 17, 0], [0, 0, 0, 0]])
def test_the_grouped_kernel_computes_what_the_loop_does(counts):
    """On CUDA the grouped kernel takes the loop's place; the CPU has a slow one of the same interface."""
    experts = Experts(4, D, 24, seed=0, layer=1)
    x_ND = torch.randn(sum(counts), D, requires_grad=True)
    ends_E = torch.tensor(counts).cumsum(0)
    results = []
    for apply in (grouped_feed_forward, looped_feed_forward):
        y_ND = apply(x_ND, ends_E, experts.w1, experts.w2, experts.w3)
        results.append((y_ND, *torch.autograd.grad(y_ND.square().sum(), [x_ND, *experts.parameters()])))
    for grouped, looped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=1e-5, atol=1e-5)
