"""A text is a molecule, or is rejected for a reason that is right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rdkit import Chem, rdBase

from data_pipeline.chemistry import REJECT_REASONS, MoleculeReject, canonical_molecule
from data_pipeline.encode import encode_rows


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("C\udcff", "not_utf8"),
        ("C C", "whitespace"),
        ("CC\tid", "whitespace"),
        (" C", "whitespace"),
        ("CC |c:0|", "whitespace"),
        ("C" * 513, "too_large"),
        ("C" * 10_001, "too_large"),
        ("[Na+]." * 600 + "[Cl-]", "too_large"),
        ("C1CC", "syntax"),
        ("é", "syntax"),
        ("InChI=1S/CH4/h1H4", "syntax"),
        ("C\x00C", "syntax"),
        ("CN(C)(C)(C)C", "valence"),
        ("[CH5]", "valence"),
        ("c1cccc1", "kekulize"),
        ("cccc", "sanitize"),
    ],
)
def test_reason(text: str, reason: str) -> None:
    with rdBase.BlockLogs(), pytest.raises(MoleculeReject) as caught:
        canonical_molecule(text, max_atoms=512)
    assert caught.value.reason == reason


@pytest.mark.parametrize("text", ["C", "*", "[H][H]", "[2H]O", "[CH3]", "[Na+].[Cl-]", "C->[Pt]", "C" * 512, "*CC*"])
def test_accepted(text: str) -> None:
    smiles, mol = canonical_molecule(text, max_atoms=512)
    assert Chem.MolToSmiles(mol) == smiles == Chem.CanonSmiles(text)


def test_long_text_of_a_small_molecule_is_accepted() -> None:
    text = "[12CH3+0:1]" + "[CH2]" * 198 + "[CH3]"
    assert len(text) > 512
    assert canonical_molecule(text, max_atoms=512)[1].GetNumAtoms() == 200


def test_spellings_of_a_molecule_give_the_same_result() -> None:
    (first, one), (second, two) = (canonical_molecule(text, 512) for text in ("OC(=O)c1ccccc1", "c1ccc(cc1)C(O)=O"))
    assert first == second
    assert one.ToBinary() == two.ToBinary()


@given(st.text(alphabet="CNOPScno[]()=#@+-/\\.%1234567890H*~:$ \x00é\udcff", max_size=30))
def test_any_text_is_a_molecule_or_a_reject(text: str) -> None:
    encoded = encode_rows([text], ["id"])
    assert encoded.batch.num_rows + len(encoded.rejects) == 1
    assert all(reject.reason in REJECT_REASONS for reject in encoded.rejects)
    assert all(Chem.MolFromSmiles(smiles) is not None for smiles in encoded.batch.column("smiles").to_pylist())
