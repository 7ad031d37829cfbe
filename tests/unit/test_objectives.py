"""Losses against slow references; masks as pure functions."""

import math

import numpy as np
import pytest
import torch

from hmoe_ds.config import ModelConfig, RouterConfig
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.objectives.contrast import count_anchors, scaffold_contrast_loss
from hmoe_ds.objectives.masking import draw_masks
from hmoe_ds.objectives.router_losses import choice_entropy, router_balance_loss


@pytest.fixture(scope="module")
def store(dataset):
    return ShardStore(dataset, "train")


def slow_contrast(u, scaffold, generic, t):
    losses = {}
    for m in range(len(scaffold)):
        positives = [n for n in range(len(scaffold)) if n != m and scaffold[n] == scaffold[m] and scaffold[m] != 0]
        negatives = [n for n in range(len(scaffold)) if generic[n] != generic[m]]
        if not positives:
            continue
        total = sum(math.exp(float(u[m] @ u[n]) / t) for n in positives + negatives)
        losses[m] = np.mean([-math.log(math.exp(float(u[m] @ u[n]) / t) / total) for n in positives])
    return losses


KEYS = torch.tensor([3, 3, 4, 5, 0, 0, 3, 6])
GENERIC = torch.tensor([1, 1, 1, 2, 0, 0, 1, 2])


def unit_rows(count, seed=0):
    u = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return u / u.norm(dim=1, keepdim=True)


def test_contrast_matches_the_definition():
    u = unit_rows(len(KEYS))
    expected = slow_contrast(u, KEYS.tolist(), GENERIC.tolist(), 0.3)
    assert set(expected) == {0, 1, 6}  # lone scaffolds and acyclic molecules are no anchors
    assert count_anchors(KEYS.numpy()) == 3
    loss = scaffold_contrast_loss(u, u, KEYS, GENERIC, first=0, temperature=0.3)
    assert float(loss) == pytest.approx(sum(expected.values()))


def test_contrast_of_the_parts_adds_up_to_the_whole():
    u = unit_rows(len(KEYS))
    whole = scaffold_contrast_loss(u, u, KEYS, GENERIC, 0, 0.3)
    parts = [scaffold_contrast_loss(u[a:b], u, KEYS, GENERIC, a, 0.3) for a, b in ((0, 3), (3, 3), (3, 8))]
    assert float(sum(parts)) == pytest.approx(float(whole))


def test_contrast_has_a_finite_gradient_when_nothing_can_be_compared():
    u = unit_rows(4).requires_grad_()
    same_generic = torch.ones(4, dtype=torch.long)
    scaffold_contrast_loss(u, u, torch.tensor([1, 2, 3, 4]), same_generic, 0, 0.3).backward()
    assert torch.equal(u.grad, torch.zeros_like(u))


def test_masks_are_pure_functions_of_molecule_epoch_and_seed(store):
    rows = np.arange(60)
    epoch = np.zeros(60, np.int64)
    batch = gather(store, rows)
    masks = draw_masks(batch, epoch, 0.2, seed=5)
    reversed_batch = gather(store, rows[::-1].copy())
    reversed_masks = draw_masks(reversed_batch, epoch, 0.2, seed=5)
    for whole, flipped, molecule, flipped_molecule in (
        (masks.atom_N, reversed_masks.atom_N, batch.molecule_N, reversed_batch.molecule_N),
        (
            masks.bond_M,
            reversed_masks.bond_M,
            batch.molecule_N[batch.edge_index_2M[0, ::2]],
            reversed_batch.molecule_N[reversed_batch.edge_index_2M[0, ::2]],
        ),
    ):
        for m in range(60):
            assert torch.equal(whole[molecule == m], flipped[flipped_molecule == 59 - m])
    assert not torch.equal(masks.atom_N, draw_masks(batch, epoch, 0.2, seed=6).atom_N)
    assert not torch.equal(masks.atom_N, draw_masks(batch, epoch + 1, 0.2, seed=5).atom_N)


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_the_hidden_share_is_the_ratio(store, ratio):
    batch = gather(store, np.arange(len(store)))
    masks = draw_masks(batch, np.zeros(len(store), np.int64), ratio, seed=0)
    for mask in masks:
        spread = math.sqrt(ratio * (1 - ratio) / len(mask))
        assert abs(mask.double().mean().item() - ratio) < 5 * spread


def test_a_lone_molecule_takes_its_view_as_its_positive():
    """Molecules 2, 3 and 7 are alone with their scaffolds, 4 and 5 are acyclic."""
    u, view = unit_rows(len(KEYS)), unit_rows(len(KEYS), seed=1)
    expected = slow_contrast(u, KEYS.tolist(), GENERIC.tolist(), 0.3)
    for m in (2, 3, 7):
        own = math.exp(float(u[m] @ view[m]) / 0.3)
        others = sum(math.exp(float(u[m] @ u[n]) / 0.3) for n in range(len(KEYS)) if GENERIC[n] != GENERIC[m])
        expected[m] = -math.log(own / (own + others))
    assert count_anchors(KEYS.numpy(), with_views=True) == len(expected) == 6
    loss = scaffold_contrast_loss(u, u, KEYS, GENERIC, 0, torch.tensor(0.3), view)
    assert float(loss) == pytest.approx(sum(expected.values()))
    parts = [scaffold_contrast_loss(u[a:b], u, KEYS, GENERIC, a, 0.3, view[a:b]) for a, b in ((0, 3), (3, 8))]
    assert float(sum(parts)) == pytest.approx(float(loss))


@pytest.fixture(params=["hard", "soft", "flat", "additive", "soft, groups by lot"])
def routed(request, store):
    """-> router, batch, what a model makes of it, and the model."""
    form, _, by_lot = request.param.partition(", ")
    router = RouterConfig(
        experts=8, groups=4, experts_per_atom=2, gate_size=8, form=form, top_p=0.6,
        group_choice="random" if by_lot else "learned",
    )  # fmt: skip
    model = HMoEModel(ModelConfig(hidden_size=16, dense_size=16), router).double()
    for layer in model.encoder.moe_layers():
        layer.gate.route_bias.normal_(generator=torch.Generator().manual_seed(0))
    batch = gather(store, np.arange(40))
    return router, batch, model(batch), model


def test_the_balance_loss_matches_the_definition(routed):
    router, batch, encoding, _ = routed
    p = encoding.scaffold.log_p_BG.exp()
    top = encoding.scaffold.groups_BC[:, 0].tolist()
    expected = 4 * sum(top.count(g) / 40 * p[:, g].mean().item() for g in range(4))
    for routing in encoding.atoms:
        chosen = [e for e in routing.choices_NK.flatten().tolist() if e < 8]
        mean = [0.0] * 8
        experts, weights = routing.candidates.expert_NM.tolist(), routing.candidates.log_w_NM.exp().tolist()
        for candidates, values in zip(experts, weights, strict=True):
            for e, w in zip(candidates, values, strict=True):
                mean[e] += w / batch.num_atoms
        expected += 8 * sum(chosen.count(e) / len(chosen) * mean[e] for e in range(8)) / len(encoding.atoms)
    loss = router_balance_loss(encoding, batch.molecule_N, router, [None] * len(encoding.atoms), 40, batch.num_atoms)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_entropy_of_choices_matches_the_definition(routed):
    _, batch, encoding, model = routed
    entropies = []
    for routing in encoding.atoms:
        for row in routing.candidates.log_w_NM.exp().tolist():
            shares = [w / sum(row) for w in row if w > 0]  # by lot, the experts of one group have all
            entropies.append(-sum(s * math.log(s) for s in shares))
    loss = choice_entropy(encoding, batch.num_atoms)
    assert loss.item() == pytest.approx(np.mean(entropies))
    keys = [layer.gate.keys for layer in model.encoder.moe_layers()]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, keys))
