"""The model on real molecules: permutations, export, the same result in any batch, scale at the start."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from hmoe_ds.config_parser import load_config, preset_names
from hmoe_ds.data.batch import MolBatch, gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.model.description import ModelFormatError
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.moe.experts import GatedFeedForward
from tests.presets import shrunken
from tests.small_model import MODEL, ROUTER


@pytest.fixture(scope="module")
def store(dataset):
    return ShardStore(dataset, "train")


@pytest.fixture(scope="module")
def model():
    return HMoEModel(MODEL, ROUTER, seed=1).double().eval()


def rows_of(store, count=40, seed=0):
    return np.random.default_rng(seed).choice(len(store), count, replace=False)


def permute_atoms(batch: MolBatch, generator) -> tuple[MolBatch, torch.Tensor]:
    """Shuffle the atoms inside each molecule; -> the batch and the old position of each new atom."""
    order = torch.cat(
        [
            first + torch.randperm(int(size), generator=generator)
            for first, size in zip(batch.ptr_B[:-1], batch.ptr_B.diff(), strict=True)
        ]
    )
    new_place = torch.empty_like(order)
    new_place[order] = torch.arange(len(order))
    shuffled = MolBatch(
        batch.atom_features_N9[order],
        new_place[batch.edge_index_2M],
        batch.bond_features_M3,
        batch.molecule_N,
        batch.ptr_B,
        batch.scaffold_mask_N[order],
        batch.scaffold_key_B,
        batch.generic_key_B,
        batch.mol_key_B2,
    )
    return shuffled, order


@torch.no_grad()
def test_permuting_atoms_permutes_states_and_changes_nothing_else(store, model):
    batch = gather(store, rows_of(store))
    shuffled, order = permute_atoms(batch, torch.Generator().manual_seed(0))
    before, after = model(batch), model(shuffled)
    torch.testing.assert_close(after.h_ND, before.h_ND[order])
    torch.testing.assert_close(after.scaffold.u_BP, before.scaffold.u_BP)
    assert torch.equal(after.atoms[1].choices_NK, before.atoms[1].choices_NK[order])


@torch.no_grad()
def test_permuting_molecules_permutes_embeddings(store, model):
    rows = rows_of(store)
    order = np.random.default_rng(1).permutation(len(rows))
    torch.testing.assert_close(model.embed(gather(store, rows[order])), model.embed(gather(store, rows))[order])


@torch.no_grad()
def test_a_molecule_has_the_same_embedding_in_any_batch(store, model):
    rows = rows_of(store)
    together = model.embed(gather(store, rows))
    alone = torch.cat([model.embed(gather(store, rows[i : i + 1])) for i in range(len(rows))])
    torch.testing.assert_close(together, alone)


def test_embedding_is_the_mean_atom_state(store, model):
    batch = gather(store, rows_of(store, 5))
    states = model(batch).h_ND
    expected = torch.stack([states[batch.molecule_N == m].mean(dim=0) for m in range(5)])
    torch.testing.assert_close(model.embed(batch), expected)


def test_the_seed_alone_decides_the_initial_weights():
    torch.manual_seed(0)
    first = HMoEModel(MODEL, ROUTER, seed=7).state_dict()
    torch.manual_seed(1)
    second = HMoEModel(MODEL, ROUTER, seed=7).state_dict()
    third = HMoEModel(MODEL, ROUTER, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_model_is_the_model(dtype, store, tmp_path):
    model = HMoEModel(MODEL, ROUTER, seed=1)
    for layer in model.encoder.moe_layers():
        layer.gate.route_bias.normal_(std=0.1)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)  # as the engine casts: parameters, not buffers
    model.save_pretrained(tmp_path / "model", {"step": 3})
    loaded = HMoEModel.from_pretrained(tmp_path / "model")
    batch = gather(store, rows_of(store))
    before, after = model(batch), loaded(batch)
    assert after.h_ND.dtype == dtype
    assert torch.equal(before.h_ND, after.h_ND)
    assert torch.equal(before.atoms[0].weights_NK, after.atoms[0].weights_NK)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelFormatError, match="hmoe export"):
        HMoEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_model_is_refused(name, tmp_path):
    HMoEModel(MODEL, ROUTER).save_pretrained(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelFormatError, match="holds a damaged model"):
        HMoEModel.from_pretrained(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    HMoEModel(MODEL, ROUTER).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    HMoEModel(MODEL, dataclasses.replace(ROUTER, shared_size=0)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelFormatError, match="are of different models"):
        HMoEModel.from_pretrained(tmp_path)


def test_another_format_version_is_refused(tmp_path):
    HMoEModel(MODEL, ROUTER).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "format_version": 99}))
    with pytest.raises(ModelFormatError, match="format_version 99"):
        HMoEModel.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("preset", preset_names())
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_routed_part_starts_at_the_scale_of_a_dense_layer(preset, seed, store):
    """Invariant 10, on real molecules; presets that do not fit into a test are made small."""
    config = load_config(["--config", preset, *([] if preset in ("tiny_cpu", "small_1gpu") else shrunken(preset))])
    model = HMoEModel(config.model, config.router, seed=seed)
    torch.manual_seed(seed)
    dense = GatedFeedForward(config.model.hidden_size, config.model.dense_size)
    ratios = []

    def compare(layer, arguments, output):
        x_ND = arguments[0]
        routed_ND = output[0] - layer.shared(x_ND) if layer.shared else output[0]
        ratios.append(float(routed_ND.square().mean().sqrt() / dense(x_ND).square().mean().sqrt()))

    for layer in model.encoder.moe_layers():
        layer.register_forward_hook(compare)
    model(gather(store, rows_of(store, 40, seed)))
    assert len(ratios) == len(model.encoder.moe_layers()) > 0
    assert all(0.5 <= ratio <= 2.0 for ratio in ratios), ratios
