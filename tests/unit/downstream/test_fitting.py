"""Fits: they learn, the same each time, from what has a label; what a frozen encoder means; how layers learn."""

import copy

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import Descriptors

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.downstream.fitting import FitError, FitOptions, fit, outputs_of
from hmoe_ds.downstream.label_scale import label_scale, scaled_back
from hmoe_ds.downstream.property_model import PropertyModel, parameter_groups
from hmoe_ds.downstream.splits import Split
from hmoe_ds.model.hmoe import HMoEModel
from tests.small_model import MODEL, ROUTER
from tests.unit.downstream.test_splits import nci

SMILES = nci(240)


@pytest.fixture(scope="module")
def molecules():
    encoded = encode_rows(SMILES, [""] * len(SMILES), standardize=False)
    assert encoded.kept.tolist() == list(range(len(SMILES)))
    return encoded.batch


@pytest.fixture(scope="module")
def split():
    order = np.random.default_rng(0).permutation(len(SMILES))
    return Split(*(np.sort(rows) for rows in np.split(order, [160, 200])))


def weights() -> np.ndarray:
    return np.array([[Descriptors.HeavyAtomMolWt(Chem.MolFromSmiles(text))] for text in SMILES])


def start(seed=0, targets=1):
    return PropertyModel(HMoEModel(MODEL, ROUTER, seed=2), targets, "mean+max+size", dropout=0.1, seed=seed)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_a_fit_learns_and_is_the_same_each_time(mode, molecules, split):
    epochs, learning_rate = (15, 3e-3) if mode == "full" else (60, 1e-2)
    options = FitOptions(head_epochs=0, mode=mode, epochs=epochs, learning_rate=learning_rate)
    runs = []
    for draw in (1, 2):
        torch.manual_seed(draw)  # of no account
        runs.append(fit(start(), molecules, weights(), split, "regression", options, seed=4))
    assert runs[0].validation == runs[1].validation
    assert same(runs[0].model, runs[1].model)
    assert same(runs[0].model.encoder, start().encoder) == (mode == "frozen")
    spread = weights()[split.validation].std() / weights()[split.train].std()
    assert min(runs[0].validation) < (0.7 if mode == "full" else 0.9) * spread
    assert runs[0].best_epoch == 1 + int(np.argmin(runs[0].validation))
    other = fit(start(), molecules, weights(), split, "regression", options, seed=5)
    assert other.validation != runs[0].validation


def test_the_weights_are_those_of_the_best_epoch(molecules, split):
    options = FitOptions(head_epochs=0, epochs=12, patience=3, learning_rate=0.03)
    fitted = fit(start(), molecules, weights(), split, "regression", options, seed=0)
    assert len(fitted.validation) == min(12, fitted.best_epoch + 3)
    predicted = scaled_back(outputs_of(fitted.model, molecules, "cpu"), fitted.scale)
    rmse = np.sqrt(np.mean((predicted - weights())[split.validation] ** 2))
    [deviation] = fitted.scale.deviation_T
    assert rmse == pytest.approx(deviation * fitted.validation[fitted.best_epoch - 1], rel=1e-5)


def test_test_labels_and_missing_labels_take_no_part(molecules, split):
    label = np.concatenate([weights(), weights()], axis=1)
    label[split.train[::2], 1] = np.nan
    options = FitOptions(head_epochs=0, epochs=2)
    one = fit(start(targets=2), molecules, label, split, "regression", options, seed=0)
    label[split.test] = 1e6
    assert same(one.model, fit(start(targets=2), molecules, label, split, "regression", options, seed=0).model)
    scale = label_scale("regression", label[split.train])
    assert scale.mean_T[1] == pytest.approx(weights()[split.train[1::2]].mean())


def test_a_fit_that_diverges(molecules, split):
    """At once it is an error; later, the best epoch so far counts."""
    with pytest.raises(FitError, match=r"learning rate 1e\+30: lower --learning-rate"):
        fit(start(), molecules, weights(), split, "regression", FitOptions(learning_rate=1e30, epochs=2), seed=0)
    broken = start()
    broken.head[1].register_forward_hook(BreaksAfter(calls=60))
    fitted = fit(
        broken, molecules, weights(), split, "regression", FitOptions(head_epochs=0, epochs=50, patience=50), seed=0
    )
    assert 0 < len(fitted.validation) < 50
    assert 0 < fitted.best_epoch <= len(fitted.validation)
    assert np.isfinite(fitted.validation).all()


def test_the_head_first(molecules, split):
    """Its best epoch is where all of the model begins, and counts with the others."""
    how = {"learning_rate": 0.003, "patience": 30}
    head = fit(start(), molecules, weights(), split, "regression", FitOptions(mode="frozen", epochs=20, **how), seed=3)
    both_options = FitOptions(head_epochs=20, epochs=6, layer_decay=0.8, **how)
    both = fit(start(), molecules, weights(), split, "regression", both_options, seed=3)
    assert both.validation[:20] == head.validation
    assert len(both.validation) == 26
    alone = fit(start(), molecules, weights(), split, "regression", FitOptions(head_epochs=0, epochs=6, **how), seed=3)
    assert both.validation[20] < alone.validation[0]
    assert both.best_epoch == 1 + int(np.argmin(both.validation)) > 20
    # Where all of the model diverges at once, the head alone is what is kept.
    broken = start()
    broken.head[1].register_forward_hook(BreaksAfter(calls=20 * 6))  # of an epoch: 5 steps, validation
    kept = fit(broken, molecules, weights(), split, "regression", both_options, seed=3)
    assert kept.validation == head.validation
    assert kept.best_epoch == head.best_epoch
    assert same(kept.model.encoder, start().encoder)


def test_the_patience_is_that_of_each_part(molecules, split):
    how = {"epochs": 9, "patience": 2, "learning_rate": 0.1}
    fitted = fit(start(), molecules, weights(), split, "regression", FitOptions(head_epochs=9, **how), seed=0)
    head = fit(start(), molecules, weights(), split, "regression", FitOptions(mode="frozen", **how), seed=0)
    assert len(fitted.validation) >= len(head.validation) + 2


def test_a_fit_of_one_step_an_epoch_that_diverges(molecules, split):
    """Its loss is still finite, and what it then says of validation is not."""
    few = Split(split.train[:20], split.validation, split.test)
    with pytest.raises(FitError, match="lower --learning-rate"):
        fit(start(), molecules, weights(), few, "regression", FitOptions(learning_rate=1e30, epochs=2), seed=0)
    broken = start()
    broken.head[1].register_forward_hook(BreaksAfter(calls=9))  # a call for the step, one for validation
    fitted = fit(
        broken, molecules, weights(), few, "regression", FitOptions(head_epochs=0, epochs=50, patience=50), seed=0
    )
    assert len(fitted.validation) == 4
    assert np.isfinite(fitted.validation).all()
    assert all(weight.isfinite().all() for weight in fitted.model.parameters())


class BreaksAfter:
    def __init__(self, calls):
        self.left = calls

    def __call__(self, module, inputs, output):
        self.left -= 1
        return output if self.left > 0 or not module.training else output * float("nan")


def test_without_a_score_on_validation_the_last_epoch_counts(molecules, split):
    label = (weights() > 150).astype(float)
    label[split.validation] = 1
    fitted = fit(start(), molecules, label, split, "classification", FitOptions(head_epochs=0, epochs=4), seed=0)
    assert fitted.best_epoch == 4
    assert np.isnan(fitted.validation).all()
    assert not same(fitted.model, start())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_a_model_in_half_precision_is_fitted_in_fp32(dtype, mode, molecules, split):
    model = PropertyModel(HMoEModel(MODEL, ROUTER, seed=2).to(dtype), 1, "mean+max+size", dropout=0.1, seed=0)
    fitted = fit(
        model, molecules, weights(), split, "regression", FitOptions(head_epochs=0, mode=mode, epochs=2), seed=0
    )
    assert np.isfinite(fitted.validation).all()
    assert fitted.model.encoder.dtype == torch.float32
    assert np.isfinite(outputs_of(fitted.model, molecules, "cpu")).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("dropout", 1.0),
        ("layer_decay", 1.5),
        ("weight_decay", -1),
    ],
)
def test_options_that_make_no_sense(name, value):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is {value}: expected a number"):
        FitOptions(**{name: value})


def test_class_weights_make_both_classes_count_alike(molecules, split):
    """A head that sees nothing learns how frequent a class is, or that both are alike."""
    label = (np.arange(len(SMILES)) % 8 == 0).astype(float)[:, None]
    chances = {}
    for weighed in (False, True):
        model = start()
        for parameter in model.head[1].parameters():
            torch.nn.init.zeros_(parameter)
        # All epochs score alike, so the first one counts.
        options = FitOptions(mode="frozen", learning_rate=0.15, batch_size=16, class_weights=weighed, dropout=0)
        fitted = fit(model, molecules, label, split, "classification", options, seed=0)
        chances[weighed] = torch.sigmoid(fitted.model.head[-1].bias).item()
    assert chances[False] < 0.3
    assert 0.35 < chances[True] < 0.65


def test_layers_further_down_learn_more_slowly():
    model = start()
    groups = parameter_groups(model, learning_rate=1.0, layer_decay=0.5)
    assert [group["lr"] for group in groups] == [1.0, 0.5, 0.25, 0.125, 0.0625]  # head, two upper, lower, embeddings
    place_of = {id(parameter): place for place, group in enumerate(groups) for parameter in group["params"]}
    encoder = model.encoder.encoder
    assert place_of[id(encoder.atom_embedding.table)] == 4
    assert place_of[id(encoder.scaffold_gate.centers)] == 3
    assert place_of[id(encoder.upper[1].feed_forward.gate.keys)] == 1
    trained = {id(parameter) for parameter in [*encoder.parameters(), *model.head.parameters()]}
    assert set(place_of) == trained


def test_outputs_do_not_depend_on_the_other_molecules(molecules):
    model = copy.deepcopy(start()).eval().double()
    together = outputs_of(model, molecules, "cpu")
    alone = np.concatenate([outputs_of(model, molecules.take([row]), "cpu") for row in range(0, 240, 40)])
    np.testing.assert_allclose(alone, together[::40], rtol=1e-12)
