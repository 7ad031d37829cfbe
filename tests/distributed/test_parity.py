"""Invariant 2: however a run is spread, it gives the choices, losses, clip norms and parameters of one fp64 process.

`test_parity_matrix.py` holds the whole matrix; here is a choice of it that has every value of every axis.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hmoe_ds.config import load_config
from hmoe_ds.data.batch import gather
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.objectives.masking import draw_masks
from hmoe_ds.training.feed import VALIDATION_MASK_SEED
from tests.distributed.layouts import Trained, check_agreement, check_bf16, layout

pytestmark = pytest.mark.timeout(1500)  # of the launches in the fixture together
FP32 = dict(
    [
        layout("1 rank", "zero 1"),
        layout("1 rank", "zero 3"),
        layout("2 ranks", "zero 1"),
        layout("2 ranks", "zero 3 spread"),
        layout("2 ranks ep 2", "zero 1"),
        layout("2 ranks ep 2", "zero 2", "accumulation"),
        layout("2 ranks ep 2", "zero 3", "accumulation", "recompute"),
        layout("4 ranks ep 2", "zero 1", "two groups"),
        layout("4 ranks ep 2", "zero 2 offload", "accumulation"),
        layout("4 ranks ep 2", "zero 3 spread", "", "recompute"),
        layout("1 rank", "zero 2", "mixture"),
        layout("2 ranks ep 2", "zero 1", "mixture"),
        layout("2 ranks ep 2", "zero 2", "soft", "recompute"),
        layout("2 ranks ep 2", "zero 3", "additive"),
        layout("2 ranks", "zero 1", "random"),
        layout("2 ranks ep 2", "zero 3", "curriculum", "recompute"),
    ]
)
BF16 = dict(
    [
        layout("2 ranks ep 2", "zero 1", precision="bf16"),
        layout("2 ranks ep 2", "zero 2", precision="bf16"),
        layout("2 ranks ep 2", "zero 2 offload", precision="bf16"),
        layout("4 ranks ep 2", "zero 3 spread", "", "recompute", "bf16"),
    ]
)


@pytest.fixture(scope="module")
def trained(dataset, second_dataset, tmp_path_factory):
    return Trained(dataset, tmp_path_factory.mktemp("parity"), FP32 | BF16, second_dataset)


@pytest.mark.parametrize("name", FP32)
def test_layouts_agree_with_one_fp64_process(name, trained, tmp_path):
    check_agreement(trained, name, tmp_path)


@pytest.mark.parametrize("name", BF16)
def test_bf16_follows_fp64(name, trained, tmp_path):
    check_bf16(trained, name, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "1 rank, zero 1",
        "2 ranks ep 2, zero 1",
        "2 ranks, zero 3 spread",
        "4 ranks ep 2, zero 3 spread, recompute, bf16",
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
