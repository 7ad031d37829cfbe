"""Molecule-level objectives: targets in batches, their scale, the heads, and the losses against slow references."""

import dataclasses
import json
import math
from typing import get_args

import numpy as np
import pytest
import torch

from data_pipeline.schema import DESCRIPTORS
from hmoe_ds.config import DataConfig, ModelConfig, MoleculeHeads, ObjectiveConfig, Readout, RouterConfig
from hmoe_ds.data.batch import MoleculeTargets, gather
from hmoe_ds.data.mixture import open_mixture
from hmoe_ds.data.plan import sequential_slices
from hmoe_ds.data.store import ShardStore
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.readout import mean_state
from hmoe_ds.objectives.molecule import (
    count_targets,
    descriptor_loss,
    fingerprint_loss,
    molecule_losses,
    set_descriptor_scale,
)
from hmoe_ds.objectives.total import count_normalizers, pretraining_losses
from hmoe_ds.training.feed import rank_slice

MODEL = ModelConfig(hidden_size=16, lower_blocks=1, upper_blocks=2, dense_size=24)
ROUTER = RouterConfig(groups=4, experts=8, experts_per_atom=2, expert_size=16, shared_size=16, gate_size=8)
BOTH = MoleculeHeads(fingerprint=True, descriptors=True)
SEEN = get_args(Readout)


@pytest.fixture(scope="module")
def store(dataset_with_targets):
    return ShardStore(dataset_with_targets, "train", targets=True)


@pytest.fixture(scope="module")
def table(dataset_with_targets):
    import datasets

    return datasets.load_from_disk(str(dataset_with_targets))["train"]


def test_targets_come_from_the_right_rows(store, table):
    # Two shards, one row twice, out of order.
    rows = np.array([len(store) - 1, 0, 350, 350, 3, *range(200, 220)])
    targets = gather(store, rows).targets
    assert (targets.fingerprint_BV.dtype, targets.descriptors_BT.dtype) == (torch.uint8, torch.float32)
    for place, row in enumerate(rows.tolist()):
        record = table[row]
        expected = [0] * 1024
        for index, count in zip(record["fingerprint_bins"], record["fingerprint_counts"], strict=True):
            expected[index] = count
        assert targets.fingerprint_BV[place].tolist() == expected
        assert targets.descriptors_BT[place].tolist() == record["descriptors"]


def test_only_a_store_that_was_asked_gives_targets(dataset_with_targets, store):
    assert gather(ShardStore(dataset_with_targets, "train"), np.arange(3)).targets is None
    empty = gather(store, np.empty(0, np.int64)).targets
    assert (empty.fingerprint_BV.shape, empty.descriptors_BT.shape) == ((0, 1024), (0, len(DESCRIPTORS)))
    moved = gather(store, np.arange(3)).to("cpu").targets
    assert torch.equal(moved.fingerprint_BV, gather(store, np.arange(3)).targets.fingerprint_BV)


def test_columns_are_views_of_the_mapped_file(store):
    for column in store.shard(0).targets:
        assert not column.flags.owndata
        assert not column.flags.writeable


def test_the_scale_is_that_of_the_training_molecules(dataset_with_targets, second_dataset_with_targets, store):
    paths = [str(dataset_with_targets), str(second_dataset_with_targets)]
    one, other = (
        np.array(gather(s, np.arange(len(s))).targets.descriptors_BT.double())
        for s in (store, ShardStore(paths[1], "train", targets=True))
    )
    mixture = open_mixture(DataConfig(path=paths), "train")
    mean, deviation = mixture.descriptor_scale()
    np.testing.assert_allclose(mean, np.concatenate([one, other]).mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(deviation, np.concatenate([one, other]).std(axis=0), rtol=1e-7)
    # Weighted as they are dealt: a copy of every molecule of the second dataset, and three of the first.
    shares = [3 * len(one), len(other)]
    mean, deviation = open_mixture(DataConfig(path=paths, weights=shares), "train").descriptor_scale()
    repeated = np.concatenate([one, one, one, other])
    np.testing.assert_allclose(mean, repeated.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(deviation, repeated.std(axis=0), rtol=1e-7)


def test_standardised_descriptors_have_mean_0_and_deviation_1(dataset_with_targets, store):
    model = HMoEModel(MODEL, ROUTER, heads=BOTH).double()
    set_descriptor_scale(model, open_mixture(DataConfig(path=str(dataset_with_targets)), "train"))
    values = gather(store, np.arange(len(store))).targets.descriptors_BT.double()
    z = model.descriptor_head.standardize(values)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(len(DESCRIPTORS)).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(dim=0, correction=0), torch.ones(len(DESCRIPTORS)).double(), atol=1e-7, rtol=0)
    model.descriptor_head.set_scale(values[0], torch.zeros(len(DESCRIPTORS)))
    assert model.descriptor_head.standardize(values[0]).tolist() == [0.0] * len(DESCRIPTORS)


def test_fingerprint_loss_is_the_divergence():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(6, 1024, generator=generator)).double().requires_grad_()
    counts = torch.zeros(6, 1024, dtype=torch.uint8)
    for row, bins in enumerate([[3], [0, 1023], list(range(40)), [7, 8, 9], [], [5]]):
        counts[row, bins] = torch.arange(1, len(bins) + 1, dtype=torch.uint8) * 6
    expected = 0.0
    for row in range(6):
        total = sum(counts[row].tolist())
        partition = sum(math.exp(x) for x in logits[row].tolist())
        for x, count in zip(logits[row].tolist(), counts[row].tolist(), strict=True):
            if count:
                expected += count / total * math.log(count / total / (math.exp(x) / partition))
    loss = fingerprint_loss(logits, counts)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert (logits.grad[4] == 0).all()  # no fingerprint
    assert logits.grad.abs().sum(dim=1).max() <= 2
    # The spread of the counts is the best prediction, and its loss 0.
    best = (counts.double() + 1e-300).log()
    assert fingerprint_loss(best[[0, 1, 2, 3, 5]], counts[[0, 1, 2, 3, 5]]).item() == pytest.approx(0, abs=1e-12)


def test_descriptor_loss_leaves_out_what_is_not_known():
    predicted = torch.tensor([[0.0, 2.0, 1.0], [0.5, -3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0.5, 0.0, math.nan], [0.5, math.nan, 1.5]], dtype=torch.float64)
    loss = descriptor_loss(predicted, target)
    assert loss.item() == pytest.approx(0.5**2 / 2 + (2 - 0.5) + 0 + (2.5 - 0.5))
    loss.backward()
    assert predicted.grad.tolist() == [[-0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]


def test_known_targets_are_counted(store):
    batch = gather(store, np.arange(4))
    assert count_targets(batch) == (4, 4 * len(DESCRIPTORS))
    fingerprint, descriptors = (column.clone() for column in batch.targets)
    fingerprint[1] = 0
    descriptors[2, :3] = math.nan
    batch = dataclasses.replace(batch, targets=MoleculeTargets(fingerprint, descriptors))
    assert count_targets(batch) == (3, 4 * len(DESCRIPTORS) - 3)
    assert count_targets(dataclasses.replace(batch, targets=None)) == (0, 0)


def losses_of_ranks(store, ranks, objective):
    """The losses of a slice, added up over ranks, by one model; and the gradient."""
    model = HMoEModel(MODEL, ROUTER, heads=objective.molecule_heads).double()
    set_descriptor_scale(model, store)
    (whole,) = sequential_slices(store, DataConfig(molecules_per_step=30, atoms_per_step=9999, bonds_per_step=9999), 30)
    parts = [rank_slice(store, whole, 0.2, 0, rank, ranks) for rank in range(ranks)]
    one = rank_slice(store, whole, 0.2, 0, 0, 1)
    norm = count_normalizers([one], "cpu")
    totals = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        # The contrastive loss gathers rows over real ranks, so these leave it out.
        part = dataclasses.replace(part, counts=[part.batch.num_molecules], rank=0)
        keys = {"scaffold_key_B": part.batch.scaffold_key_B, "generic_key_B": part.batch.generic_key_B}
        encoding = model(part.batch, part.masks)
        losses = pretraining_losses(model, encoding, None, dataclasses.replace(part, **keys), objective, norm, 0.2)
        losses.total.backward()
        totals += torch.stack([losses.fingerprint, losses.descriptors])
    return totals, {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("readout", SEEN)
def test_the_shares_of_ranks_add_up(readout, dataset_with_targets):
    store = open_mixture(DataConfig(path=str(dataset_with_targets)), "train", targets=True)
    objective = ObjectiveConfig(fingerprint_weight=0.3, descriptor_weight=0.7, contrast_weight=0.0, readout=readout)
    one, gradient = losses_of_ranks(store, 1, objective)
    assert (one > 0).all()
    assert all(value is not None for value in gradient.values())
    for ranks in (2, 3):
        several, other_gradient = losses_of_ranks(store, ranks, objective)
        torch.testing.assert_close(several, one)
        for name, value in gradient.items():
            torch.testing.assert_close(other_gradient[name], value)


@pytest.mark.parametrize("readout", SEEN)
def test_a_rank_without_molecules_has_a_gradient(readout, store):
    model = HMoEModel(MODEL, ROUTER, heads=BOTH._replace(readout=readout))
    batch = gather(store, np.empty(0, np.int64))
    fingerprint, descriptors = molecule_losses(model, model(batch).h_ND, batch)
    assert fingerprint.item() == descriptors.item() == 0
    (fingerprint + descriptors).backward()
    for head in (model.fingerprint_head, model.descriptor_head):
        assert all((weight.grad == 0).all() for weight in head.parameters())


def test_a_batch_without_targets_is_refused(dataset):
    model = HMoEModel(MODEL, ROUTER, heads=BOTH)
    batch = gather(ShardStore(dataset, "train"), np.arange(3))
    with pytest.raises(ValueError, match="no targets for the model's heads: open its dataset with targets=True"):
        molecule_losses(model, model(batch).h_ND, batch)
    assert sum(molecule_losses(HMoEModel(MODEL, ROUTER), model(batch).h_ND, batch)).item() == 0


def test_heads_leave_the_rest_of_the_model_as_it_is():
    plain = HMoEModel(MODEL, ROUTER, seed=3).state_dict()
    for heads in (BOTH, MoleculeHeads(fingerprint=True), MoleculeHeads(descriptors=True)):
        state = HMoEModel(MODEL, ROUTER, seed=3, heads=heads).state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.items())
        extra = {name.split(".")[0] for name in state.keys() - plain.keys()}
        names = {"fingerprint": "fingerprint_head", "descriptors": "descriptor_head"}
        assert extra == {names[name] for name in heads.names}


@torch.no_grad()
@pytest.mark.parametrize("readout", SEEN)
def test_heads_and_their_scale_are_exported(readout, store, dataset_with_targets, tmp_path):
    model = HMoEModel(MODEL, ROUTER, heads=BOTH._replace(readout=readout)).eval()
    set_descriptor_scale(model, open_mixture(DataConfig(path=str(dataset_with_targets)), "train"))
    model.save_pretrained(tmp_path / "model")
    loaded = HMoEModel.from_pretrained(tmp_path / "model")
    batch = gather(store, np.arange(20))
    for one, other in zip(*(molecule_losses(m, m(batch).h_ND, batch) for m in (model, loaded)), strict=True):
        assert torch.equal(one, other)
    assert loaded.heads == model.heads
    if readout == "mean":  # a model from before heads could see more
        config = tmp_path / "model" / "config.json"
        content = json.loads(config.read_text())
        del content["molecule_heads"]["readout"]
        config.write_text(json.dumps(content))
        assert HMoEModel.from_pretrained(tmp_path / "model").heads == model.heads
    # A model from before there were such heads.
    HMoEModel(MODEL, ROUTER).save_pretrained(tmp_path / "old")
    config = tmp_path / "old" / "config.json"
    content = json.loads(config.read_text())
    del content["molecule_heads"]
    config.write_text(json.dumps(content))
    assert HMoEModel.from_pretrained(tmp_path / "old").fingerprint_head is None


@pytest.mark.parametrize("readout", SEEN)
def test_gradient_descent_learns_both(readout, store, dataset_with_targets):
    torch.manual_seed(0)
    model = HMoEModel(dataclasses.replace(MODEL, hidden_size=32), ROUTER, heads=BOTH._replace(readout=readout))
    set_descriptor_scale(model, open_mixture(DataConfig(path=str(dataset_with_targets)), "train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(40):
        batch = gather(store, np.arange(64 * (step % 4), 64 * (step % 4 + 1)))
        fingerprint, descriptors = molecule_losses(model, model(batch).h_ND, batch)
        history.append((fingerprint.item() / 64, descriptors.item() / 64 / len(DESCRIPTORS)))
        optimizer.zero_grad()
        (fingerprint / 64 + descriptors / 64 / len(DESCRIPTORS)).backward()
        optimizer.step()
    start, end = (np.mean(part, axis=0) for part in (history[:4], history[-4:]))
    assert (end < 0.75 * start).all()


@torch.no_grad()
def test_the_mean_state_of_a_large_molecule_is_right_in_bf16(store):
    batch = gather(store, np.argsort(-store.shard(0).num_atoms.astype(int))[:3])
    h = 1 + torch.rand(batch.num_atoms, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = mean_state(h, batch)
    expected = torch.stack([h[batch.molecule_N == m].double().mean(dim=0) for m in range(3)])
    assert found.dtype == torch.bfloat16
    assert batch.ptr_B.diff().min() > 30
    # As near as a number of 8 bits can be; a sum kept in bf16 would be some percent off.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=0)
