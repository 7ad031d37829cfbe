"""Invariant 2: however a run is spread, it gives the choices, losses, clip norms and parameters of one fp64 process.

`test_parity_matrix.py` holds the whole matrix; here is a choice of it that has every value of every axis.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hmoe_ds.config_parser import load_config
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.objectives.masking import draw_masks
from hmoe_ds.training.feed import VALIDATION_MASK_SEED
from tests.distributed.layouts import Trained, check_agreement, check_bf16, layout
from tests.distributed.reference import descriptor_scale, slow_descriptors, slow_fingerprint, slow_readouts

pytestmark = pytest.mark.timeout(1500)  # of the launches in the fixture together
FP32 = dict(
    [
        layout("1 rank", "zero 1"),
        layout("2 ranks", "zero 3 spread"),
        layout("2 ranks ep 2", "zero 1"),
        layout("2 ranks ep 2", "zero 3", "accumulation", "recompute"),
        layout("4 ranks ep 2", "zero 1", "two groups"),
        layout("4 ranks ep 2", "zero 2 offload", "accumulation"),
        layout("4 ranks ep 2", "zero 3 spread", "", "recompute"),
        layout("2 ranks ep 2", "zero 1", "mixture"),
        layout("2 ranks ep 2", "zero 2", "soft", "recompute"),
        layout("2 ranks ep 2", "zero 3", "additive"),
        layout("2 ranks", "zero 1", "random"),
        layout("2 ranks ep 2", "zero 3", "curriculum", "recompute"),
        layout("1 rank", "zero 1", "targets"),
        layout("2 ranks ep 2", "zero 3 spread", "targets"),
        layout("2 ranks ep 2", "zero 1", "splits"),
        layout("4 ranks ep 2", "zero 2 offload", "splits"),
        layout("2 ranks ep 2", "zero 2", "splits in groups", "recompute"),
        layout("2 ranks ep 2", "zero 1", "migration"),
        layout("4 ranks ep 2", "zero 2", "migration of two groups", "recompute"),
        layout("2 ranks ep 2", "zero 3 spread", "migration with targets"),
    ]
)
UNSPLIT = dict([layout("2 ranks ep 2", "zero 1", "no split")])
BF16 = dict(
    [
        layout("2 ranks ep 2", "zero 1", precision="bf16"),
        layout("2 ranks ep 2", "zero 1", "targets", precision="bf16"),
        layout("2 ranks ep 2", "zero 2 offload", precision="bf16"),
        layout("2 ranks ep 2", "zero 1", "migration", precision="bf16"),
        layout("4 ranks ep 2", "zero 3 spread", "", "recompute", "bf16"),
    ]
)


@pytest.fixture(scope="module")
def trained(dataset, second_dataset, dataset_with_targets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    return Trained(dataset, folder, FP32 | BF16 | UNSPLIT, second_dataset, dataset_with_targets)


@pytest.mark.parametrize("name", FP32)
def test_layouts_agree_with_one_fp64_process(name, trained, tmp_path):
    check_agreement(trained, name, tmp_path)


@pytest.mark.parametrize("name", BF16)
def test_bf16_follows_fp64(name, trained, tmp_path):
    check_bf16(trained, name, tmp_path)


@pytest.mark.parametrize("name", ["2 ranks ep 2, zero 1, splits", "4 ranks ep 2, zero 2 offload, splits"])
def test_experts_split_over_ranks_without_a_change_of_the_loss(name, trained):
    folder, lines = trained.run(name)
    splits = [json.loads(line) for line in (folder / "allocation.jsonl").read_text().splitlines()]
    assert [(split["step"], split["layer"]) for split in splits] == [(s, n) for s in (2, 4, 6) for n in (1, 2)]
    assert {split["parent"] // 8 == split["slot"] // 8 for split in splits} == {True, False}, "both on and over ranks"
    assert [line["experts_live"] for line in lines] == [4, 4, 5, 5, 6, 6, 7]
    folder, unsplit = trained.run("2 ranks ep 2, zero 1, no split")
    assert (folder / "allocation.jsonl").read_text() == ""
    # The step after the first split has the loss that it would have had; later ones have not.
    for line, other in zip(lines[:3], unsplit[:3], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert all(abs(line["loss"] - other["loss"]) > 1e-5 for line, other in zip(lines[4:], unsplit[4:], strict=True))


def test_dead_experts_are_reclaimed(trained):
    folder, _ = trained.run("2 ranks ep 2, zero 2, splits in groups, recompute")
    splits = [json.loads(line) for line in (folder / "allocation.jsonl").read_text().splitlines()]
    assert {split["reclaimed"] for split in splits} == {True, False}
    assert all(split["parent"] // 4 == split["slot"] // 4 for split in splits)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "1 rank, zero 1",
        "2 ranks ep 2, zero 1",
        "2 ranks, zero 3 spread",
        "4 ranks ep 2, zero 3 spread, recompute, bf16",
        "2 ranks ep 2, zero 1, splits",
    ],
)
def test_the_exported_model_is_the_trained_model(name, trained, dataset, tmp_path):
    """Invariant 7: the export computes, in one process and without DeepSpeed, what the ranks computed together."""
    folder, lines = trained.run(name)
    export_checkpoint(folder, tmp_path / "model")
    model = HMoEModel.from_pretrained(tmp_path / "model")
    config = load_config(["--config", str(folder / "config.yaml")])
    store = ShardStore(dataset, "validation")
    batch = gather(store, np.arange(config.data.validation_molecules))
    masks = draw_masks(
        batch, np.zeros(batch.num_molecules, np.int64), config.objective.mask_ratio, VALIDATION_MASK_SEED
    )
    logits = model.atom_head(model(batch, masks).h_ND[masks.atom_N]).float()
    loss = F.cross_entropy(logits, batch.atom_features_N9[masks.atom_N, 0].long())
    assert lines[-1]["validation_molecules"] == batch.num_molecules
    assert lines[-1]["validation_loss_atom"] == pytest.approx(
        loss.item(), rel=1e-5 if model.dtype == torch.float32 else 1e-3
    )


def test_a_learned_temperature_is_reported(trained):
    name = "2 ranks ep 2, zero 3, additive"
    found = [line["contrast_temperature"] for line in trained.run(name)[1]]
    assert found == pytest.approx([temperature for *_, temperature in trained.reference(name)[0]], rel=1e-4)
    assert len(set(found)) == len(found)
    assert "contrast_temperature" not in trained.run("1 rank, zero 1")[1][0]


def test_validation_does_not_depend_on_the_layout(trained):
    one, *others = (
        trained.run(name)[1][-1]
        for name in (
            "1 rank, zero 1",
            "2 ranks ep 2, zero 1",
            "2 ranks, zero 3 spread",
            "4 ranks ep 2, zero 3 spread, recompute",
        )
    )
    figures = [name for name in one if name.startswith("validation_")]
    assert len(figures) > 5
    for other in others:
        for name in figures:
            assert other[name] == pytest.approx(one[name], rel=1e-3), name


@torch.no_grad()
@pytest.mark.parametrize("name", ["1 rank, zero 1, targets", "2 ranks ep 2, zero 3 spread, targets"])
def test_validation_measures_what_is_predicted_of_molecules(name, trained, dataset_with_targets, tmp_path):
    folder, lines = trained.run(name)
    export_checkpoint(folder, tmp_path / "model")
    model = HMoEModel.from_pretrained(tmp_path / "model").double()
    config = load_config(["--config", str(folder / "config.yaml")])
    store = ShardStore(dataset_with_targets, "validation", targets=True)
    batch = gather(store, np.arange(config.data.validation_molecules))
    masks = draw_masks(
        batch, np.zeros(batch.num_molecules, np.int64), config.objective.mask_ratio, VALIDATION_MASK_SEED
    )
    readout_BW = slow_readouts(config.objective.readout, model(batch, masks).h_ND, batch)
    fingerprint = slow_fingerprint(model.fingerprint_head(readout_BW), batch.targets.fingerprint_BV).mean()
    scale = descriptor_scale(ShardStore(dataset_with_targets, "train", targets=True))
    predicted_BT = model.descriptor_head(readout_BW, batch.ptr_B.diff())
    descriptors = slow_descriptors(predicted_BT, batch.targets.descriptors_BT, *scale).mean()
    last = lines[-1]
    assert last["validation_loss_fingerprint"] == pytest.approx(fingerprint.item(), rel=1e-5)
    assert last["validation_loss_descriptors"] == pytest.approx(descriptors.item(), rel=1e-5)
    masked = last["validation_loss_atom"] + config.objective.bond_weight * last["validation_loss_bond"]
    assert last["validation_loss"] == pytest.approx(masked + 0.3 * fingerprint.item() + 0.6 * descriptors.item())
    assert {"loss_fingerprint", "loss_descriptors"} <= last.keys()
    assert not any("descriptors" in key for key in trained.run("1 rank, zero 1")[1][-1])
