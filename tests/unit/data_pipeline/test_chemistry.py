"""A text is a molecule, or is rejected for a reason that is right."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem, rdBase
from rdkit.Chem import rdDepictor, rdDistGeom

from data_pipeline.molecules.chemistry import canonical_molecule, reread
from data_pipeline.molecules.encode import encode_rows
from data_pipeline.molecules.rejects import MAX_MOLBLOCK_LENGTH, REJECT_REASONS, MoleculeReject


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
        ("éCCN", "syntax"),
        ("CCO\u2026", "syntax"),
        ("\x00\x00CO", "syntax"),
        ("CCN\x00", "syntax"),
        ("\ufffdCO", "syntax"),
        ("InChI=1S/nonsense", "inchi"),
        ("InChI=", "inchi"),
        (Chem.MolToInchi(Chem.MolFromSmiles("C" * 520)), "too_large"),
        ("C\n", "molblock"),
        ("a\nb\nc\n  1  0  0\n", "molblock"),
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
    smiles, mol, is_reread = canonical_molecule(text, max_atoms=512)
    assert Chem.MolToSmiles(mol) == smiles == Chem.CanonSmiles(text)
    assert not is_reread


def test_long_text_of_a_small_molecule_is_accepted() -> None:
    text = "[12CH3+0:1]" + "[CH2]" * 198 + "[CH3]"
    assert len(text) > 512
    assert canonical_molecule(text, max_atoms=512).mol.GetNumAtoms() == 200


@pytest.mark.parametrize(
    ("mapped", "plain"),
    [
        ("[CH3:1][OH:2]", "CO"),
        ("CC[C@H:3](C)O", "CC[C@H](C)O"),
        ("[CH3:1][C@:2]([H:9])(F)Cl", "C[C@]([H])(F)Cl"),
        ("[13CH4:7]", "[13CH4]"),
    ],
)
def test_atom_maps_are_no_part_of_a_molecule(mapped: str, plain: str) -> None:
    for molecule in (canonical_molecule(mapped, max_atoms=512), canonical_molecule(molblock(mapped), max_atoms=512)):
        assert molecule.smiles == Chem.CanonSmiles(plain)
        assert not any(atom.GetAtomMapNum() for atom in molecule.mol.GetAtoms())


THALIDOMIDE = "O=C1CC[C@@H](N2C(=O)c3ccccc3C2=O)C(=O)N1"
CAFFEINE_INCHI = "InChI=1S/C8H10N4O2/c1-10-4-9-6-5(10)7(13)12(3)8(14)11(6)2/h4H,1-3H3"


def molblock(smiles: str, embed: bool = False, v3000: bool = False) -> str:
    """A mol block with 2D coordinates, or with 3D coordinates and explicit hydrogens."""
    mol = Chem.MolFromSmiles(smiles)
    if embed:
        mol = Chem.AddHs(mol)
        assert rdDistGeom.EmbedMolecule(mol, randomSeed=1) == 0
    else:
        rdDepictor.Compute2DCoords(mol)
    return Chem.MolToMolBlock(mol, forceV3000=v3000)


@pytest.mark.parametrize(
    ("text", "smiles"),
    [
        (CAFFEINE_INCHI, "Cn1c(=O)c2c(ncn2C)n(C)c1=O"),
        ("InChI=1S/C3H7NO2/c1-2(4)3(5)6/h2H,4H2,1H3,(H,5,6)/t2-/m0/s1", "C[C@H](N)C(=O)O"),
        (molblock(THALIDOMIDE), THALIDOMIDE),
        (molblock(THALIDOMIDE, v3000=True), THALIDOMIDE),
        (molblock("C/C=C\\Cl").replace("\n", "\r\n"), "C/C=C\\Cl"),
    ],
)
def test_inchi_and_mol_block(text: str, smiles: str) -> None:
    found = canonical_molecule(text, max_atoms=512)
    assert found.smiles == Chem.CanonSmiles(smiles)
    assert found.is_reread


def test_mol_block_in_three_dimensions_has_the_stereo_of_its_coordinates() -> None:
    block = molblock(THALIDOMIDE, embed=True)
    flat = "\n".join(line[:39] + "  0  0  0" + line[48:] if len(line) > 60 else line for line in block.splitlines())
    assert canonical_molecule(flat, max_atoms=512).smiles == THALIDOMIDE
    mirrored = "\n".join(mirror(line) for line in flat.splitlines())
    assert canonical_molecule(mirrored, max_atoms=512).smiles == Chem.CanonSmiles(THALIDOMIDE.replace("@@", "@"))


def mirror(line: str) -> str:
    """An atom's line with x turned to -x; other lines as they are."""
    return f"{-float(line[:10]):10.4f}{line[10:]}" if len(line) > 60 else line


def test_size_of_a_mol_block_is_that_of_its_heavy_atoms() -> None:
    block = molblock("C" * 20, embed=True)
    assert canonical_molecule(block, max_atoms=20).mol.GetNumAtoms() == 20
    with pytest.raises(MoleculeReject, match="too_large"):
        canonical_molecule(block, max_atoms=19)
    with pytest.raises(MoleculeReject, match="too_large"):
        canonical_molecule(block + "\n" * MAX_MOLBLOCK_LENGTH, max_atoms=20)


def test_mol_block_of_an_impossible_molecule_is_named() -> None:
    mol = Chem.MolFromSmiles("CN(C)(C)(C)C", sanitize=False)
    with rdBase.BlockLogs(), pytest.raises(MoleculeReject, match="valence"):
        canonical_molecule(Chem.MolToMolBlock(mol, kekulize=False), max_atoms=20)
    with pytest.raises(MoleculeReject, match="no_atoms"):
        canonical_molecule(Chem.MolToMolBlock(Chem.Mol()), max_atoms=20)


def test_spellings_of_a_molecule_give_the_same_result() -> None:
    texts = ["OC(=O)c1ccccc1", "c1ccc(cc1)C(O)=O", Chem.MolToMolBlock(Chem.MolFromSmiles("c1ccccc1C(=O)O"))]
    first, *others = [canonical_molecule(text, 512).smiles for text in texts]
    assert others == [first, first]
    assert reread(first).mol.ToBinary() == Chem.MolFromSmiles(first).ToBinary()


@settings(deadline=None)  # the first call compiles
@given(st.text(alphabet="CNOPScno[]()=#@+-/\\.%1234567890H*~:$ \x00é\udcff", max_size=30))
def test_any_text_is_a_molecule_or_a_reject(text: str) -> None:
    encoded = encode_rows([text], ["id"])
    assert encoded.batch.num_rows + len(encoded.rejects) == 1
    assert all(reject.reason in REJECT_REASONS for reject in encoded.rejects)
    assert all(Chem.MolFromSmiles(smiles) is not None for smiles in encoded.batch.column("smiles").to_pylist())
