"""The fast decoder: equal to the reference, used only where it is, and given up where it is not."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem, RDConfig, rdBase

from data_pipeline.molecules import fast_path, featurize_fast
from data_pipeline.molecules.chemistry import CanonicalMolecule, canonical_molecule, reread
from data_pipeline.molecules.encode import EncodedRows, encode_rows
from data_pipeline.molecules.featurize_fast import featurize_chunk, written
from data_pipeline.molecules.reference import describe
from data_pipeline.molecules.rejects import MoleculeReject
from data_pipeline.molecules.scaffold_fast import clear_scaffold_memos
from tests.unit.data_pipeline.conftest import COLLECTIONS, collection_texts

NCI = Path(RDConfig.RDDataDir, "NCI", "first_5K.smi")


@pytest.fixture(autouse=True)
def _judged_anew() -> Iterator[None]:
    fast_path.is_usable.cache_clear()
    yield
    fast_path.is_usable.cache_clear()


def is_exact(molecule: CanonicalMolecule) -> bool:
    return bool(featurize_chunk([written(molecule)]).is_exact[0])


def check_reference(texts: list[str]) -> int:
    """Rows of `texts` are the reference's; returns how many of them the fast decoder left to it."""
    with rdBase.BlockLogs():
        encoded = encode_rows(texts, texts, standardize=False)
        unknown = 0
        for row, scaffold_smiles in zip(encoded.batch.to_pylist(), encoded.scaffold_smiles, strict=True):
            expected = describe(row["smiles"])
            assert row["atom_features"] == expected.arrays.atom_features.reshape(-1).tolist(), row["smiles"]
            assert row["bond_index"] == expected.arrays.bond_index.reshape(-1).tolist(), row["smiles"]
            assert row["bond_features"] == expected.arrays.bond_features.reshape(-1).tolist(), row["smiles"]
            assert row["scaffold_mask"] == expected.scaffold_mask.tolist(), row["smiles"]
            assert (row["scaffold_key"], row["generic_key"]) == (expected.scaffold.key, expected.scaffold.generic_key)
            assert scaffold_smiles == expected.scaffold.smiles
        for reject in encoded.rejects:
            with pytest.raises(MoleculeReject, match=reject.reason):
                reread(canonical_molecule(texts[reject.index], max_atoms=512).smiles)
        molecules = [canonical_molecule(texts[index], 512) for index in encoded.kept.tolist()]
        unknown = np.count_nonzero(~featurize_chunk([written(molecule) for molecule in molecules]).is_exact)
    return int(unknown)


def test_it_is_used_here() -> None:
    assert fast_path.is_usable()


def test_rows_are_the_references_on_nci() -> None:
    texts = [line.split()[0] for line in NCI.read_text().splitlines()]
    assert check_reference(texts) < 0.02 * len(texts)


def test_rows_are_the_references_whatever_the_spelling() -> None:
    """The first spelling, its Kekule form and its order must leave no trace."""
    spelled = []
    for line in NCI.read_text().splitlines()[:1500:3]:
        mol = Chem.MolFromSmiles(line.split()[0])
        if mol is not None:
            spelled.append(Chem.MolToRandomSmilesVect(mol, 1, randomSeed=3)[0])
            Chem.Kekulize(mol, clearAromaticFlags=True)
            spelled.append(
                Chem.MolToSmiles(mol, kekuleSmiles=True, canonical=False, rootedAtAtom=mol.GetNumAtoms() - 1)
            )
    check_reference(spelled)


@pytest.mark.slow
@pytest.mark.skipif(not COLLECTIONS.is_dir(), reason=f"no molecule collections at {COLLECTIONS}")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["zinc.smi.gz", "chembl.tsv.gz", "enamine50k.csv.gz"])
def test_rows_are_the_references_on_all_real_molecules(name: str) -> None:
    texts = collection_texts(name)
    for start in range(0, len(texts), 5000):
        check_reference(texts[start : start + 5000])


@pytest.mark.parametrize(
    "text",
    ["*c1ccccc1", "[H][H]", "[2H]OC", "C->[Pt]", "C~C", "[CH3]", "C$C", "[Fe@OH1](C)(N)(O)(F)(Cl)Br"],
)
def test_the_unusual_is_left_to_the_reference(text: str) -> None:
    assert not is_exact(canonical_molecule(text, max_atoms=512))
    assert check_reference([text, "CCO"]) == 1


def test_query_atoms_and_residues_are_left_to_the_reference() -> None:
    query = Chem.MolFromSmarts("[#6]-[#6]")
    query.UpdatePropertyCache()
    assert not is_exact(CanonicalMolecule(Chem.MolToSmiles(query), query, is_reread=False))
    peptide = Chem.MolFromSequence("GA")
    assert not is_exact(CanonicalMolecule(Chem.MolToSmiles(peptide), peptide, is_reread=False))


def test_atropisomers_are_left_to_the_reference() -> None:
    mol = Chem.MolFromSmiles("Cc1cccc(Cl)c1-c1c(C)cccc1Cl")
    axis = mol.GetBondBetweenAtoms(*mol.GetSubstructMatch(Chem.MolFromSmarts("c-!@c")))
    axis.SetStereoAtoms(1, 9)
    axis.SetStereo(Chem.BondStereo.STEREOATROPCW)
    assert not is_exact(CanonicalMolecule(Chem.MolToSmiles(mol), mol, is_reread=False))


def test_large_molecules() -> None:
    """From 256 atoms on the binary format has wider indices."""
    peptide = Chem.MolToSmiles(Chem.MolFromSequence("ACDEFGHIKLMNPQRSTVWY" * 3))
    for text in (
        peptide,
        "C" * 255,
        "C" * 256,
        "C1" + "C" * 298 + "C1",
        "c1ccccc1" * 60,
        ".".join(["C[C@H](F)Cl"] * 100),
    ):
        assert is_exact(canonical_molecule(text, max_atoms=512))
        assert check_reference([text]) == 0


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_a_truncated_binary_is_not_decoded(cut: int) -> None:
    molecule = written(canonical_molecule("C[C@@H](F)CC(=O)Nc1ccc[nH+]c1", max_atoms=512))
    short = featurize_fast.WrittenMolecule(molecule.smiles, molecule.binary[: max(30, 30 + cut)], molecule.order)
    chunk = featurize_chunk([molecule, short, molecule])
    assert chunk.is_exact.tolist() in ([True, False, True], [True, True, True])
    if chunk.is_exact[1]:
        atoms = slice(chunk.atom_offsets[1], chunk.atom_offsets[2])
        assert np.array_equal(chunk.atom_features[atoms], chunk.atom_features[: chunk.atom_offsets[1]])


def unknown_version() -> np.ndarray:
    return np.frombuffer(bytes(20), dtype=np.uint8)


def misread(decode: Callable[..., None]) -> Callable[..., None]:
    """Decode, and get the hybridisation of every atom wrong."""

    def decode_wrongly(*arguments: np.ndarray) -> None:
        decode(*arguments)
        arguments[9][:, 6] ^= 1

    return decode_wrongly


THREE_NEIGHBORS = [
    "C[N@]1C[C@H]1C",
    "C[P@@]1CCC[C@H]1C",
    "C[S@@+]1CCCc2ccccc21",
    "[P@H2]Cc1ccccc1CBr",
    "CC1(C)CN(Cc2ccc(Cl)c(C(F)(F)F)c2)CC[S@+]1[O-]",
    "C[S@](=O)c1ccccc1",
    "C[As@]1CCC[C@H]1C",
]


def test_centres_of_three_neighbors() -> None:
    """RDKit turns some of them around where a ring is closed."""
    assert check_reference(THREE_NEIGHBORS) == len(THREE_NEIGHBORS)


@pytest.mark.parametrize("text", ["C[Pt@@](Cl)(Cl)N", "CCCC[S@H2]C(=N)N", "C[C@H](C)O"])
def test_a_mark_without_meaning_leaves_no_trace(text: str) -> None:
    """RDKit drops it from the SMILES, but not from the hybridisation of the atom it was read for."""
    check_reference([text])
    with_mark, without = encode_rows([text, text.replace("@", "")], ["id", "id"], standardize=False).batch.to_pylist()
    assert with_mark == without


def test_what_rdkit_writes_but_does_not_read_is_a_reject() -> None:
    text = "C1(=CC=CC(=C1NC1=C2C(=NC(=N1)C)N(C1C=CC=CC=1)[N+2]=C2)CC)CC"
    assert [reject.reason for reject in encode_rows([text], ["id"], standardize=False).rejects] == ["unstable_smiles"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("_ATOMS_AT", 40), ("_version", unknown_version), ("_decode_chunk", misread(featurize_fast._decode_chunk))],
)
def test_another_format_is_noticed_and_costs_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, value: object
) -> None:
    texts = ["C[C@H](F)C#N", "c1ccccc1C", "*C"]
    rows = encode_rows(texts, texts).batch.to_pylist()
    fast_path.is_usable.cache_clear()
    monkeypatch.setattr(featurize_fast, name, value)
    assert not fast_path.self_test()
    with caplog.at_level(logging.WARNING):
        assert encode_rows(texts, texts).batch.to_pylist() == rows
    assert "unknown binary format" in caplog.text


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["C[C@H](F)C#N", "c1ccccc1C(=O)O"]
    rows = encode_rows(texts, texts).batch.to_pylist()
    fast_path.is_usable.cache_clear()
    monkeypatch.setenv(fast_path.FEATURIZE_VARIABLE, "reference")
    assert not fast_path.is_usable()
    assert encode_rows(texts, texts).batch.to_pylist() == rows


def test_a_wrong_row_in_the_sample_costs_time_and_no_row(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert fast_path.is_usable()
    texts = ["C" * length for length in range(1, 400)]
    rows = encode_rows(texts, texts).batch.to_pylist()
    monkeypatch.setattr(featurize_fast, "_decode_chunk", misread(featurize_fast._decode_chunk))
    assert encode_rows(texts, texts).batch.to_pylist() == rows
    assert "please report this SMILES; it and the 399 molecules around it are encoded the slow way" in caplog.text


def test_rows_do_not_depend_on_what_was_encoded_before(real_smiles: list[str]) -> None:
    texts = real_smiles[:1500]

    def outcome(encoded: EncodedRows) -> tuple[list[dict], list[str]]:
        return encoded.batch.to_pylist(), encoded.scaffold_smiles

    clear_scaffold_memos()
    rows, scaffolds = outcome(encode_rows(texts, texts))
    warm = outcome(encode_rows(texts, texts))
    assert warm == (rows, scaffolds)
    clear_scaffold_memos()
    backwards, scaffolds_backwards = outcome(encode_rows(texts[::-1], texts[::-1]))
    assert (backwards[::-1], scaffolds_backwards[::-1]) == (rows, scaffolds)
