"""Licence notes: what is recognised, and what is not."""

import pytest

from data_pipeline.sources.provenance import licence_note


@pytest.mark.parametrize(
    ("path", "owner"),
    [
        ("/data/zinc.smi.gz", "ZINC: free to use; redistribution of large parts needs permission"),
        ("ZINC22_subset-3.smi", "ZINC: "),
        ("/data/our_zinc20.csv", "ZINC: "),
        ("CID-SMILES.gz", "PubChem: public domain"),
        ("Compound_000000001_000500000.sdf.gz", "PubChem: "),
        ("chembl_35_chemreps.txt.gz", "ChEMBL: CC BY-SA 3.0"),
        ("2024.07_Enamine_REAL_DB_10.6M.cxsmiles.bz2", "Enamine: "),
        ("gdb13.cno.smi.gz", "GDB: "),
        ("GDB-17.50000000.smi", "GDB: "),
        ("bbbp.csv", "MoleculeNet: "),
        ("toxcast.csv.gz", "MoleculeNet: "),
        ("https://files.docking.org/zinc20-ML/ZINC20_smiles_1.smi", "ZINC: "),
        ("hf://datasets/someone/pubchem/data/part-0.parquet", "PubChem: "),
    ],
)
def test_known_collections(path: str, owner: str) -> None:
    note = licence_note(path.rpartition("/")[2], path)
    assert note is not None
    assert note.startswith(owner)
    assert note.endswith("(assumed from the file name)")
    assert "\n" not in note


@pytest.mark.parametrize(
    "path",
    ["molecules.smi", "benzinc.smi", "/home/zinc/mine.smi", "s3://bucket/a.smi", "hivemind.csv", "compound_x.sdf"],
)
def test_unknown(path: str) -> None:
    assert licence_note(path.rpartition("/")[2], path) is None


def test_a_file_of_two_collections_has_the_terms_of_both() -> None:
    note = licence_note("zinc_and_chembl.smi", "zinc_and_chembl.smi")
    assert note is not None
    assert "ZINC: " in note
    assert "ChEMBL: " in note


def test_what_is_known_for_certain_is_not_assumed() -> None:
    for name, path, words in (("nci5k", "/x/first_5K.smi", "BSD-3-Clause"), ("synth:10", "synth:10", "no terms")):
        note = licence_note(name, path)
        assert note is not None
        assert words in note
        assert "assumed" not in note
