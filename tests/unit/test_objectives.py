"""Losses against slow references; masks as pure functions."""

import math

import numpy as np
import pytest
import torch

from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.objectives.contrast import count_anchors, scaffold_contrast_loss
from hmoe_ds.objectives.masking import draw_masks


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
