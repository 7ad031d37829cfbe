"""Stored arrays equal what `ogb.utils.smiles2graph` gives for the stored SMILES."""

import numpy as np
import pytest
from rdkit import Chem

from data_pipeline.molecules.encode import EncodedRows, encode_rows
from data_pipeline.molecules.featurize import featurize
from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES

ogb_features = pytest.importorskip("ogb.utils.features")
smiles2graph = pytest.importorskip("ogb.utils.mol").smiles2graph

UNUSUAL = [
    "*c1ccccc1",
    "[H][H]",
    "[2H]C([2H])([2H])O",
    "C~C",
    "C->[Pt]",
    "[Fe@OH1](C)(N)(O)(F)(Cl)Br",
    "CC=[C@]=CC",
    "C/C=C/C",
    "[CH2]C[CH]",
    "FS(F)(F)(F)(F)F",
    "[Na+].[Cl-]",
    "[Og]",
    "[U+6]",
    "[Cr-6]",
    "B12B3B4B1B5B2B3B45",
    "C$C",
    "CC(=O)O.[H]",
]


def assert_equal_to_ogb(row: dict) -> None:
    graph = smiles2graph(row["smiles"])
    one_way = np.array(row["bond_index"], dtype=np.int64).reshape(-1, 2)
    both_ways = np.stack([one_way, one_way[:, ::-1]], axis=1).reshape(-1, 2).T
    bond_features = np.array(row["bond_features"], dtype=np.int64).reshape(-1, 3)
    assert np.array_equal(graph["node_feat"], np.reshape(row["atom_features"], (-1, 9))), row["smiles"]
    assert np.array_equal(graph["edge_index"], both_ways), row["smiles"]
    assert np.array_equal(graph["edge_feat"], np.repeat(bond_features, 2, axis=0)), row["smiles"]
    assert graph["num_nodes"] == row["num_atoms"]
    assert graph["edge_index"].shape[1] == 2 * row["num_bonds"]


def test_sizes_are_ogbs() -> None:
    assert list(ATOM_FEATURE_SIZES) == ogb_features.get_atom_feature_dims()
    assert list(BOND_FEATURE_SIZES) == ogb_features.get_bond_feature_dims()


def test_equal_to_ogb_on_real_molecules(real_rows: EncodedRows) -> None:
    assert real_rows.batch.num_rows >= 5_900
    for row in real_rows.batch.to_pylist():
        assert_equal_to_ogb(row)


def test_equal_to_ogb_on_unusual_molecules() -> None:
    encoded = encode_rows(UNUSUAL, UNUSUAL)
    assert encoded.rejects == []
    for row in encoded.batch.to_pylist():
        assert_equal_to_ogb(row)


def test_stereo_outside_ogbs_list_becomes_any() -> None:
    mol = Chem.MolFromSmiles("Cc1cccc(Cl)c1-c1c(C)cccc1Cl")
    axis = mol.GetBondBetweenAtoms(*mol.GetSubstructMatch(Chem.MolFromSmarts("c-!@c")))
    axis.SetStereoAtoms(1, 9)
    axis.SetStereo(Chem.BondStereo.STEREOATROPCW)
    assert featurize(mol).bond_features[axis.GetIdx(), 1] == BOND_FEATURE_SIZES[1] - 1


def test_dtypes_and_shapes() -> None:
    arrays = featurize(Chem.MolFromSmiles("C"))
    assert (arrays.atom_features.dtype, arrays.atom_features.shape) == (np.uint8, (1, 9))
    assert (arrays.bond_index.dtype, arrays.bond_index.shape) == (np.uint16, (0, 2))
    assert (arrays.bond_features.dtype, arrays.bond_features.shape) == (np.uint8, (0, 3))
