import numpy as np
from rdkit import Chem
from rdkit.Chem import AllChem

from hmoe_ds.downstream.baselines import ecfp, forest_predictions

SMILES = ["CCO", "c1ccccc1C(=O)N", "CC(C)Cc1ccc(cc1)C(C)C(=O)O"]


def test_ecfp_is_the_classic_function_of_rdkit():
    expected = [list(AllChem.GetMorganFingerprintAsBitVect(Chem.MolFromSmiles(s), 2, 2048)) for s in SMILES]
    assert np.array_equal(ecfp(SMILES), np.array(expected, np.uint8))


def test_an_odd_molecule_is_taken_in_silence(capfd):
    """RDKit would warn of a hydrogen without a neighbour, once for each such molecule."""
    assert ecfp(["[H+].CCO"]).sum() > 0
    assert not capfd.readouterr().err


def test_forests_of_targets_with_gaps():
    fingerprint_nV = np.random.default_rng(0).integers(0, 2, (60, 16)).astype(np.uint8)
    follows = fingerprint_nV[:, 3].astype(float)
    gaps, one_class, unlabelled = follows.copy(), np.full(60, 1.0), np.full(60, np.nan)
    gaps[:20] = one_class[:30] = np.nan
    label_nT = np.stack([gaps, one_class, unlabelled], axis=1)
    chance_nT = forest_predictions(fingerprint_nV, label_nT, np.arange(40), "classification", seed=0)
    assert ((chance_nT[:, 0] > 0.5) == follows).mean() > 0.9
    assert (chance_nT[:, 1] == 1).all()
    assert (chance_nT[:, 2] == 0).all()
    value_nT = forest_predictions(fingerprint_nV, 10 * label_nT, np.arange(40), "regression", seed=0)
    assert abs(value_nT[:, 0] - 10 * follows).mean() < 2
    assert (value_nT[:, 1] == 10).all()
