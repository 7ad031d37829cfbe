"""What the head of a property model sees of molecules, against numpy one molecule at a time."""

import json
import math
from typing import get_args

import numpy as np
import pytest
import torch

from data_pipeline.errors import UsageError
from data_pipeline.molecules.encode import encode_rows
from hmoe_ds.config import Readout
from hmoe_ds.downstream.embed import EmbedOptions
from hmoe_ds.downstream.fitting import Fit, FitOptions, fit
from hmoe_ds.downstream.inference import batches_of
from hmoe_ds.downstream.label_scale import LabelScale
from hmoe_ds.downstream.predictor import load_predictor, save_predictor
from hmoe_ds.downstream.property_model import PropertyModel
from hmoe_ds.downstream.splits import Split
from hmoe_ds.model.hmoe import HMoEModel
from hmoe_ds.model.readout import read_out
from hmoe_ds.model.size import readout_width
from tests.small_model import MODEL, ROUTER
from tests.unit.downstream.test_splits import nci

SMILES = [*nci(240), "C", "[Na+].[Cl-]"]
READOUTS = get_args(Readout)
ALL_PARTS = "mean+max+sum+size"


@pytest.fixture(scope="module")
def molecules():
    encoded = encode_rows(SMILES, [""] * len(SMILES), standardize=False)
    assert len(encoded.kept) == len(SMILES)
    return encoded.batch


@pytest.mark.parametrize("readout", READOUTS)
def test_a_readout_is_that_of_each_molecule_alone(readout, molecules):
    model = HMoEModel(MODEL, ROUTER, seed=2).eval()
    with torch.no_grad():
        found = torch.cat([read_out(readout, model(batch).h_ND, batch) for batch in batches_of(molecules)]).numpy()
        states = [
            model(each).h_ND.numpy() for row in range(len(SMILES)) for each in batches_of(molecules[row : row + 1])
        ]
    for seen, h_ND in zip(found, states, strict=True):
        parts = {
            "mean": h_ND.mean(axis=0),
            "max": h_ND.max(axis=0),
            "sum": h_ND.sum(axis=0) / 32,
            "size": np.log([len(h_ND) / 32]),
        }
        expected = np.concatenate([parts[name] for name in readout.split("+")])
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)
    assert found.shape[1] == readout_width(readout, MODEL.hidden_size)


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2**-8), (torch.float64, 1e-14)])
def test_a_readout_is_as_precise_as_its_states(dtype, near, molecules):
    [batch] = batches_of(molecules[:40])
    h_ND = torch.randn(batch.num_atoms, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = read_out(ALL_PARTS, h_ND, batch)
    assert found.dtype == dtype
    for row, states in enumerate(h_ND.double().split(batch.ptr_B.diff().tolist())):
        sums = states.sum(dim=0) / 32
        expected = [*states.mean(dim=0), *states.amax(dim=0), *sums, math.log(len(states) / 32)]
        torch.testing.assert_close(found[row].double(), torch.tensor(expected).double(), rtol=near, atol=near)


def test_all_parts_of_a_readout_teach_the_encoder(molecules):
    model = HMoEModel(MODEL, ROUTER, seed=2).double()
    [batch] = batches_of(molecules[:8])
    state = model.encoder.norm.weight
    weight_W = torch.linspace(-1, 1, readout_width(ALL_PARTS, MODEL.hidden_size), dtype=torch.float64)

    def value():
        return (read_out(ALL_PARTS, model(batch).h_ND, batch) @ weight_W).sum()

    [slope_D] = torch.autograd.grad(value(), state)
    for place in (0, 3):
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                state[place] += step
                values.append(value())
                state[place] -= step
        assert float(slope_D[place]) == pytest.approx(float(values[0] - values[1]) / 2e-6, rel=1e-4)


def test_equal_maxima_share_their_gradient():
    """Atoms that are alike, as those of a symmetric molecule are, have the same states."""
    encoded = encode_rows(["CCO", "CC"], ["", ""], standardize=False)
    [batch] = batches_of(encoded.batch)
    for states, shares in (([1, 1, 0, 2, 2], [0.5, 0.5, 0, 0.5, 0.5]), ([0, -1, -2, 0, 0], [1, 0, 0, 0.5, 0.5])):
        h_ND = torch.tensor(states).float().unsqueeze(1).requires_grad_()
        for sign in (1, -1):
            [slope_ND] = torch.autograd.grad(sign * read_out("mean+max+size", h_ND, batch)[:, 1].sum(), h_ND)
            assert (sign * slope_ND).flatten().tolist() == shares


def test_what_a_mean_cannot_tell(molecules):
    """The number of atoms, read from an encoder that is not trained."""
    label = np.array(molecules.column("num_atoms").to_pylist(), dtype=float)[:, None]
    order = np.random.default_rng(0).permutation(len(SMILES))
    split = Split(*(np.sort(rows) for rows in np.split(order, [180, 210])))
    errors = {}
    for readout in READOUTS:
        options = FitOptions(mode="frozen", readout=readout, epochs=80, learning_rate=1e-2, dropout=0.0)
        model = PropertyModel(HMoEModel(MODEL, ROUTER, seed=2), 1, readout, dropout=0.0, seed=0)
        errors[readout] = min(fit(model, molecules, label, split, "regression", options, seed=0).validation)
    assert errors["mean+max+size"] < 0.5 * errors["mean"]


def test_sums_tell_of_molecules_larger_than_all_that_were_learned_from(molecules):
    """The number of atoms again, from a frozen encoder: the simplest quantity that adds up over atoms."""
    label = np.array(molecules.column("num_atoms").to_pylist(), dtype=float)[:, None]
    by_size = np.argsort(label[:, 0], kind="stable")
    smaller = np.random.default_rng(0).permutation(by_size[:200])
    split = Split(np.sort(smaller[:160]), np.sort(smaller[160:]), by_size[200:])
    errors = {}
    for readout in ("mean+max+size", "mean+max+sum+size"):
        options = FitOptions(mode="frozen", readout=readout, epochs=80, learning_rate=1e-2, dropout=0.0)
        model = PropertyModel(HMoEModel(MODEL, ROUTER, seed=2), 1, readout, dropout=0.0, seed=0)
        fitted = fit(model, molecules, label, split, "regression", options, seed=0)
        errors[readout] = np.abs(fitted.outputs(molecules) - label)[split.test].mean()
    assert errors["mean+max+sum+size"] < 0.75 * errors["mean+max+size"]


def test_a_readout_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"--readout is sum: expected one of mean, mean\+max\+size"):
        FitOptions(readout="sum")
    with pytest.raises(UsageError, match=r"readout is 'sum': expected one of mean, mean\+max\+size"):
        EmbedOptions(readout="sum").width(16)


@pytest.mark.parametrize("readout", READOUTS)
def test_a_predictor_keeps_its_readout(readout, molecules, tmp_path):
    members = [PropertyModel(HMoEModel(MODEL, ROUTER, seed=2), 1, readout, 0.0, seed).eval() for seed in range(2)]
    fits = [Fit(member, LabelScale([5.0], [2.0]), 1, [0.5]) for member in members]
    description = {"task": "regression", "targets": ["y"], "standardize": False}
    save_predictor(tmp_path, fits, description, {}, frozen=False)
    expected = np.mean([each.outputs(molecules) for each in fits], axis=0)
    np.testing.assert_allclose(load_predictor(tmp_path).predict(molecules).mean_nT, expected, rtol=1e-6)
    if readout == "mean":  # as the first version wrote it
        content = json.loads((tmp_path / "predictor.json").read_text()) | {"format_version": 1}
        del content["readout"]
        (tmp_path / "predictor.json").write_text(json.dumps(content))
        np.testing.assert_allclose(load_predictor(tmp_path).predict(molecules).mean_nT, expected, rtol=1e-6)
