"""Invariant 2: however a run is spread, it gives the losses, clip norms and parameters of one fp64 process.

The reference below has no ranks, no DeepSpeed, no packed losses: one model in double precision, one batch, torch's
AdamW, and losses written as their definitions say.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hmoe_ds.config import load_config
from hmoe_ds.data.batch import gather
from hmoe_ds.data.plan import BatchPlan
from hmoe_ds.data.store import ShardStore
from hmoe_ds.downstream.export import export_checkpoint
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.objectives.masking import draw_masks
from hmoe_ds.training.engine import learning_rate_ratio
from hmoe_ds.training.feed import VALIDATION_MASK_SEED
from tests.distributed.harness import arguments, train_all

# A tight clip norm, so that a wrong norm shows in the parameters.
CLIPPED = {"optim__clip_norm": 0.5}
ACCUMULATED = CLIPPED | {"optim__accumulation": 3, "data__molecules_per_step": 96}
TWO_GROUPS = CLIPPED | {"router__groups_per_molecule": 2}

# name: (ranks, overrides); what a layout must agree with is the reference of its overrides without `parallel`.
LAYOUTS = {
    "1 rank": (1, CLIPPED),
    "1 rank, zero 2": (1, CLIPPED | {"parallel__zero_stage": 2}),
    "2 ranks, ep 1": (2, CLIPPED),
    "2 ranks, ep 2": (2, CLIPPED | {"parallel__ep_size": 2}),
    "2 ranks, ep 1, zero 2": (2, CLIPPED | {"parallel__zero_stage": 2}),
    "2 ranks, ep 2, zero 2": (2, CLIPPED | {"parallel__ep_size": 2, "parallel__zero_stage": 2}),
    "2 ranks, ep 2, accumulation": (2, ACCUMULATED | {"parallel__ep_size": 2}),
    "2 ranks, ep 2, zero 2, accumulation": (2, ACCUMULATED | {"parallel__ep_size": 2, "parallel__zero_stage": 2}),
    "2 ranks, ep 2, two groups per molecule": (2, TWO_GROUPS | {"parallel__ep_size": 2}),
}
BF16 = {
    f"2 ranks, ep 2, bf16, zero {stage}": (
        2,
        CLIPPED | {"parallel__ep_size": 2, "parallel__zero_stage": stage, "parallel__precision": "bf16"},
    )
    for stage in (1, 2)
}


def slow_contrast(u_BP, scaffold, generic, t):
    terms = []
    for m in range(len(scaffold)):
        positives = [n for n in range(len(scaffold)) if n != m and scaffold[n] == scaffold[m] and scaffold[m] != 0]
        negatives = [n for n in range(len(scaffold)) if generic[n] != generic[m]]
        if positives:
            similar = torch.exp(u_BP @ u_BP[m] / t)
            total = similar[positives + negatives].sum()
            terms.append(torch.stack([-torch.log(similar[n] / total) for n in positives]).mean())
    return torch.stack(terms)


def reference_losses(model, config, parts):
    """The step's loss from its slices `(batch, masks)`."""
    atom, bond, contrast, z_scaffold, z_atom = [], [], [], [], []
    for batch, masks in parts:
        encoding = model(batch, masks)
        h = encoding.h_ND
        atom.append(
            F.cross_entropy(
                model.atom_head(h)[masks.atom_N],
                batch.atom_features_N9[masks.atom_N, 0].long(),
                reduction="none",
            )
        )
        begin, end = batch.edge_index_2M[:, ::2]
        logits = model.bond_head(h[begin], h[end])
        bond.append(
            F.cross_entropy(logits[masks.bond_M], batch.bond_features_M3[masks.bond_M, 0].long(), reduction="none")
        )
        contrast.append(
            slow_contrast(
                encoding.scaffold.u_BP,
                batch.scaffold_key_B.tolist(),
                batch.generic_key_B.tolist(),
                config.objective.contrast_temperature,
            )
        )
        z_scaffold.append(encoding.scaffold.z_B)
        z_atom.append(torch.stack([routing.z_N for routing in encoding.atoms]).mean(dim=0))
    means = [torch.cat(terms).mean() for terms in (atom, bond, contrast, z_scaffold, z_atom)]
    objective = config.objective
    total = (
        means[0]
        + objective.bond_weight * means[1]
        + objective.contrast_weight * means[2]
        + objective.z_weight * (means[3] + means[4])
    )
    return total, means


def reference_run(dataset, config):
    model = HMoEModel(config.model, config.router, config.run.seed).double()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
    )
    store = ShardStore(dataset, "train")
    plan = BatchPlan(store, config.data, optim.accumulation, config.run.seed)
    history = []
    for step in range(config.run.steps):
        parts = []
        for whole in plan.next_step():
            batch = gather(store, whole.rows_B)
            parts.append((batch, draw_masks(batch, whole.epoch_B, config.objective.mask_ratio, config.run.seed)))
        loss, _ = reference_losses(model, config, parts)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate * learning_rate_ratio(step, config.run.steps, optim)
        with torch.no_grad():
            encodings = [(batch, model(batch, masks)) for batch, masks in parts]
        optimizer.step()
        move_biases(model, config, encodings)
        history.append((loss.item(), norm.item()))
    return history, model.state_dict()


def move_biases(model, config, encodings):
    router = config.router
    atoms_G = torch.zeros(router.groups)
    for batch, encoding in encodings:
        for m, groups in enumerate(encoding.scaffold.groups_BC.tolist()):
            for g in groups:
                atoms_G[g] += float((batch.molecule_N == m).sum())
    move_bias(model.encoder.scaffold_gate.route_bias, atoms_G, router.group_balance_rate)
    for number, layer in enumerate(model.encoder.moe_layers()):
        atoms_E = torch.zeros(router.experts)
        for _, encoding in encodings:
            for e in range(router.experts):
                atoms_E[e] += float((encoding.atoms[number].choices_NK == e).sum())
        move_bias(layer.gate.route_bias, atoms_E, router.expert_balance_rate)


def move_bias(bias, load, rate):
    moved = bias + rate * torch.sign(load.mean() - load)
    bias.copy_(moved - moved.mean())


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """-> {layout: (folder, lines of metrics)} of all layouts."""
    folder = tmp_path_factory.mktemp("parity")
    layouts = LAYOUTS | BF16
    out = {name: folder / name.replace(", ", "_").replace(" ", "_") for name in layouts}
    metrics = {}
    for ranks in (1, 2):
        runs = {out[name]: overrides for name, (count, overrides) in layouts.items() if count == ranks}
        metrics |= train_all(runs, dataset, ranks)
    return {name: (out[name], metrics[out[name]]) for name in layouts}


@pytest.fixture(scope="module")
def references(dataset):
    """-> the reference of overrides, computed once for all layouts that share them."""
    found = {}

    def reference(overrides):
        shared = {name: value for name, value in overrides.items() if not name.startswith("parallel")}
        key = tuple(sorted(shared.items()))
        if key not in found:
            found[key] = reference_run(dataset, load_config(arguments("unused", dataset, **shared)))
        return found[key]

    return reference


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree_with_one_fp64_process(layout, trained, references, tmp_path):
    folder, lines = trained[layout]
    history, weights = references(LAYOUTS[layout][1])
    assert [line["step"] for line in lines] == list(range(1, len(history) + 1))
    assert all(norm > CLIPPED["optim__clip_norm"] for _, norm in history), (
        "clipping must bite for this to mean anything"
    )
    for line, (loss, norm) in zip(lines, history, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=2e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=2e-4)
    export_checkpoint(folder, tmp_path / "model")
    exported = HMoEModel.from_pretrained(tmp_path / "model").state_dict()
    assert exported.keys() == weights.keys()
    for name, value in exported.items():
        torch.testing.assert_close(value.double(), weights[name].double(), rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["1 rank", "2 ranks, ep 2", "2 ranks, ep 2, bf16, zero 1"])
def test_the_exported_model_is_the_trained_model(layout, trained, dataset, tmp_path):
    """Invariant 7: the export computes, in one process and without DeepSpeed, what the ranks computed together."""
    folder, lines = trained[layout]
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


@pytest.mark.parametrize("layout", BF16)
def test_bf16_follows_fp64(layout, trained, references, tmp_path):
    folder, lines = trained[layout]
    history, weights = references(BF16[layout][1])
    for line, (loss, norm) in zip(lines, history, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=0.02)
        assert line["grad_norm"] == pytest.approx(norm, rel=0.02)
    export_checkpoint(folder, tmp_path / "model")
    model = HMoEModel.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    # bf16 keeps 8 bits; without clipping the weights would be several learning rates (0.01 each) away.
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.double(), weights[name], rtol=0.02, atol=0.01)


def test_validation_does_not_depend_on_the_layout(trained):
    one, two = (trained[name][1][-1] for name in ("1 rank", "2 ranks, ep 2"))
    figures = [name for name in one if name.startswith("validation_")]
    assert len(figures) > 5
    for name in figures:
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
