"""Texts -> rows: every text is accounted for, and columns agree with each other."""

import hashlib

import numpy as np
import pytest
from rdkit import Chem

from data_pipeline.execution.watch import Watch
from data_pipeline.molecules import encode
from data_pipeline.molecules.encode import EncodedRows, encode_rows
from data_pipeline.molecules.fast_path import FastChunk
from data_pipeline.molecules.rejects import MoleculeReject
from data_pipeline.molecules.scaffold import scaffold_identity
from data_pipeline.molecules.scaffold_fast import clear_scaffold_memos
from data_pipeline.schema import MOLECULE_SCHEMA, REJECT_TEXT_LIMIT


def test_kept_and_rejected_rows_are_all_rows() -> None:
    texts = ["C", "C C", "c1ccccc1", "", "C1", "OCC"]
    encoded = encode_rows(texts, list("abcdef"))
    assert encoded.kept.tolist() == [0, 2, 5]
    assert [(reject.index, reject.reason) for reject in encoded.rejects] == [
        (1, "whitespace"),
        (3, "empty"),
        (4, "syntax"),
    ]
    assert encoded.batch.schema.equals(MOLECULE_SCHEMA, check_metadata=True)
    assert encoded.batch.column("smiles").to_pylist() == ["C", "c1ccccc1", "CCO"]
    assert encoded.batch.column("source_id").to_pylist() == ["a", "c", "f"]
    assert encoded.scaffold_smiles == ["", "c1ccccc1", ""]


def test_no_rows() -> None:
    encoded = encode_rows([], [])
    assert (encoded.batch.num_rows, len(encoded.kept), encoded.rejects) == (0, 0, [])


def test_columns_agree(real_rows: EncodedRows) -> None:
    batch = real_rows.batch
    lengths = {
        name: np.diff(batch.column(name).offsets.to_numpy())
        for name in batch.schema.names
        if "list" in str(batch.schema.field(name).type)
    }
    num_atoms, num_bonds = (batch.column(name).to_numpy().astype(int) for name in ("num_atoms", "num_bonds"))
    assert np.array_equal(lengths["atom_features"], 9 * num_atoms)
    assert np.array_equal(lengths["scaffold_mask"], num_atoms)
    assert np.array_equal(lengths["bond_index"], 2 * num_bonds)
    assert np.array_equal(lengths["bond_features"], 3 * num_bonds)
    assert all(column.null_count == 0 for column in batch.columns)
    for smiles, key in zip(batch.column("smiles").to_pylist()[:100], batch.column("mol_key").to_pylist(), strict=False):
        assert key == hashlib.blake2b(smiles.encode(), digest_size=16).digest()


def test_rows_do_not_depend_on_their_neighbours(real_smiles: list[str]) -> None:
    texts = real_smiles[:60]
    together = encode_rows(texts, texts).batch.to_pylist()
    apart = [row for text in reversed(texts) for row in encode_rows([text], [text]).batch.to_pylist()]
    assert together == apart[::-1]


def test_row_does_not_depend_on_the_spelling(real_smiles: list[str]) -> None:
    texts = [text for text in real_smiles[:200] if Chem.MolFromSmiles(text) is not None]
    ids = ["id"] * len(texts)
    # A new spelling may name a stereo centre differently; compare where RDKit itself sees the same molecule.
    spelled = [Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(text), 1, randomSeed=7)[0] for text in texts]
    rows, others = (encode_rows(spelling, ids).batch.to_pylist() for spelling in (texts, spelled))
    same = [row == other for row, other in zip(rows, others, strict=True)]
    assert all(agree or row["smiles"] != other["smiles"] for agree, row, other in zip(same, rows, others, strict=True))
    assert np.mean(same) > 0.95


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("C", 1),
        ("CCO", 3),
        ("c1ccccc1", 6 + 2),
        ("c1ccc2ccccc2c1", 10 + 4),
        ("C[C@H](F)Cl", 4 + 1),
        ("C/C=C/C", 4 + 1),
        ("[Na+].[Cl-]", 2),
        ("C1CC1.C1CC1", 6 + 4),
        ("[2H]C", 1),
    ],
)
def test_complexity(smiles: str, expected: int) -> None:
    batch = encode_rows([smiles], ["x"], standardize=False).batch
    assert batch.column("complexity").to_pylist() == [expected]


def test_reject_text_is_bounded_and_storable() -> None:
    (long, bad) = encode_rows(["C" * 20_000, "C\udcff"], ["a", "b"]).rejects
    assert long.text == "C" * REJECT_TEXT_LIMIT
    assert bad.text == "C\\udcff"


def test_unexpected_rdkit_error_is_a_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Invariant Violation")

    with monkeypatch.context() as patched:
        patched.setattr(encode, "canonical_molecule", fail)
        assert [reject.reason for reject in encode_rows(["C"], ["a"]).rejects] == ["rdkit_error"]
    # One that shows only when the scaffolds are worked out, in the midst of others.
    monkeypatch.setattr(FastChunk, "scaffold", lambda chunk, place: fail() if place == 1 else scaffold_identity(""))
    encoded = encode_rows(["CC", "CCO", "CCN"], ["a", "b", "c"])
    assert [(reject.index, reject.reason) for reject in encoded.rejects] == [(1, "rdkit_error")]
    assert encoded.kept.tolist() == [0, 2]
    assert encoded.batch.column("source_id").to_pylist() == ["a", "c"]
    assert encoded.batch.column("num_atoms").to_pylist() == [2, 3]


def test_all_kinds_of_text_give_the_same_row() -> None:
    smiles = "C[C@H](N)C(=O)Oc1ccccc1"
    texts = [smiles, Chem.MolToInchi(Chem.MolFromSmiles(smiles)), Chem.MolToMolBlock(Chem.MolFromSmiles(smiles))]
    row, *others = encode_rows(texts, ["id"] * 3).batch.to_pylist()
    assert others == [row, row]


class Recording(Watch):
    """Remembers what it is told of, and rejects row 2 in the second round."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int | str] = []

    def at(self, index: int) -> None:
        if index == 2 and 2 in self.heard:
            raise MoleculeReject("timeout")
        self.heard.append(index)

    def rest(self) -> None:
        self.heard.append("rest")


def test_the_watch_hears_of_each_text_before_rdkit_works_on_it() -> None:
    texts = ["CCO", "nonsense", "*c1ccccc1", "C1CC1C"]
    watch = Recording()
    encoded = encode_rows(texts, texts, watch=watch)
    assert watch.heard == [0, 1, 2, 3, "rest", 0, 3, "rest"]
    assert [(reject.index, reject.reason) for reject in encoded.rejects] == [(1, "syntax"), (2, "timeout")]
    assert encoded.batch.column("source_id").to_pylist() == ["CCO", "C1CC1C"]


@pytest.mark.parametrize("rounds", [0, 1])
def test_an_error_of_the_watch_is_no_row_s_fault(rounds: int) -> None:
    class Failing(Recording):
        def at(self, index: int) -> None:
            if self.heard.count("rest") == rounds:
                raise OverflowError("timestamp too large to convert to C _PyTime_t")
            super().at(index)

    with pytest.raises(OverflowError, match="timestamp too large"):
        encode_rows(["CCO"], ["a"], watch=Failing())


def test_scaffolds_of_this_call_are_counted() -> None:
    clear_scaffold_memos()
    first = encode_rows(["c1ccccc1C", "CCO", "c1ccccc1", "C1CCC1"], list("abcd"))
    again = encode_rows(["c1ccccc1CC", "C1CC1"], list("ab"))
    assert (first.new_scaffolds, again.new_scaffolds) == (2, 1)
