"""The H-MoE layer: parity with a dense feed-forward, permutations, chunking, scale at the start."""

from itertools import pairwise

import pytest
import torch

from hmoe_ds.config import RouterConfig
from hmoe_ds.moe.dispatch import from_experts, sort_by_expert, to_experts
from hmoe_ds.moe.experts import Experts, GatedFeedForward, LocalExecutor
from hmoe_ds.moe.gate import ScaffoldGate
from hmoe_ds.moe.grouped import GroupedProducts, LoopedProducts, feed_forward_by
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


def grouped_results(apply, counts, dtype):
    """Outputs and gradients of four experts on so many rows each."""
    experts = Experts(4, D, 24, seed=0, layer=1).to(dtype)
    x_AD = torch.randn(sum(counts), D, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y_AD = apply(torch.tensor(counts).cumsum(0), x_AD, experts.w1, experts.w2, experts.w3)
    # Sines, so that the gradient that comes in differs from row to row.
    cotangent = torch.arange(y_AD.numel()).sin().view_as(y_AD).to(dtype)
    return y_AD, *torch.autograd.grad(y_AD, [x_AD, *experts.parameters()], cotangent)


def one_by_one(ends_E, x_AD, w1_EFD, w2_EDF, w3_EFD):
    rows = [torch.empty(0, D, dtype=x_AD.dtype)]
    starts = [0, *ends_E.tolist()]
    for e, (start, end) in enumerate(pairwise(starts)):
        for x_D in x_AD[start:end]:
            rows.append((w2_EDF[e] @ (torch.nn.functional.silu(w1_EFD[e] @ x_D) * (w3_EFD[e] @ x_D))).unsqueeze(0))
    return torch.cat(rows) + 0 * (x_AD.sum() + w1_EFD.sum() + w2_EDF.sum() + w3_EFD.sum())


@pytest.mark.parametrize("counts", [[5, 0, 11, 1], [0, 0, 17, 0], [0, 0, 0, 0]])
def test_feed_forwards_of_experts_are_those_of_their_rows(counts):
    expected = grouped_results(one_by_one, counts, torch.float64)
    looped = grouped_results(lambda ends, *a: feed_forward_by(LoopedProducts(ends), *a), counts, torch.float64)
    for found, wanted in zip(looped, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="needs torch 2.10")
@pytest.mark.parametrize("counts", [[5, 0, 11, 1], [0, 0, 17, 0], [0, 0, 0, 0]])
def test_the_grouped_kernel_computes_what_the_loop_does(counts):
    """On CUDA the grouped kernel takes the loop's place; the CPU has one of the same interface."""
    looped, grouped = (
        grouped_results(lambda ends, *a, make=make: feed_forward_by(make(ends), *a), counts, torch.float32)
        for make in (LoopedProducts, GroupedProducts)
    )
    for found, wanted in zip(grouped, looped, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [40, 1, 0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_dispatch_there_and_back_is_a_weighted_sum_over_used_choices(tokens, top_p):
    generator = torch.Generator().manual_seed(tokens)
    router = RouterConfig(experts=6, groups=2, experts_per_atom=3, top_p=top_p)
    choices_NK = torch.rand(tokens, 6, generator=generator).topk(3).indices
    x_ND, weights_NK = (torch.randn(tokens, size, generator=generator, dtype=torch.float64) for size in (D, 3))
    if top_p < 1:
        unused_NK = torch.rand(tokens, 3, generator=generator) < 0.4
        choices_NK, weights_NK = choices_NK.masked_fill(unused_NK, 6), weights_NK.masked_fill(unused_NK, 0)
    inputs = [x_ND.requires_grad_(), weights_NK.requires_grad_()]
    scale_E = torch.arange(1.0, 8.0, dtype=torch.float64)

    assignments = sort_by_expert(choices_NK, router)
    expert_A = torch.arange(6).repeat_interleave(assignments.counts_E)
    rows_AD = to_experts(x_ND, assignments)
    torch.testing.assert_close(rows_AD, x_ND[assignments.token_A])
    y_ND = from_experts(rows_AD * scale_E[expert_A].unsqueeze(1), weights_NK, assignments)
    expected_ND = (weights_NK * scale_E[choices_NK]).sum(dim=1, keepdim=True) * x_ND
    torch.testing.assert_close(y_ND, expected_ND)
    cotangent_ND = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    x_grad, weights_grad = torch.autograd.grad(y_ND, inputs, cotangent_ND)
    expected_x_grad, expected_weights_grad = torch.autograd.grad(expected_ND, inputs, cotangent_ND)
    torch.testing.assert_close(x_grad, expected_x_grad)
    used_NK = choices_NK < 6
    torch.testing.assert_close(weights_grad[used_NK], expected_weights_grad[used_NK])
    assert not weights_grad[~used_NK].any()  # where nothing was computed, nothing is learned
