"""The layout of a SMILES is RDKit's own when it reads that SMILES."""

from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem, RDConfig, rdBase

from data_pipeline.molecules.smiles_layout import read_bonds, read_layout

NCI = Path(RDConfig.RDDataDir, "NCI", "first_5K.smi")
WRITTEN = [
    *(
        "C",
        "[Na+].[Cl-]",
        "C1CC2CCC1CC2",
        "ClC(Br)=CBr",
        "[13CH3]/C=C\\F",
        "N[C@@]1(F)CC2(CC1)CC2C",
        "C[C@H]1CC[C@@H]1F",
    ),
    *("c1ccc(-c2ccccc2)cc1", "O=C1C=C=CC=C1", "C#N.C1CC1", "C[N+](C)(C)C", "C1=CC=1"),
    Chem.MolToSmiles(Chem.MolFromSmiles("C12C3C4C1C5C2C3C45")),
]


def bonds_by_rdkit(smiles: str) -> list[tuple[int, int]]:
    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    return [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]


def as_text(smiles: str) -> np.ndarray:
    return np.frombuffer(smiles.encode(), dtype=np.uint8)


def check_bonds(smiles: str) -> None:
    atoms, bonds = read_bonds(as_text(smiles))
    assert atoms == Chem.MolFromSmiles(smiles, sanitize=False).GetNumAtoms(), smiles
    assert [tuple(bond) for bond in bonds.tolist()] == bonds_by_rdkit(smiles), smiles


@pytest.mark.parametrize("smiles", WRITTEN)
def test_bonds_are_those_rdkit_reads(smiles: str) -> None:
    check_bonds(smiles)


def test_bonds_are_those_rdkit_reads_in_real_molecules() -> None:
    with rdBase.BlockLogs():
        mols = [Chem.MolFromSmiles(line.split()[0]) for line in NCI.read_text().splitlines()[::3]]
    written = [Chem.MolToSmiles(mol) for mol in mols if mol is not None]
    readable = [smiles for smiles in written if "*" not in smiles and ">" not in smiles]
    assert len(readable) > 1500
    for smiles in readable:
        check_bonds(smiles)


def test_more_than_nine_open_closures() -> None:
    """A closure's number orders its bond, whatever it has of digits."""
    chain = "".join(f"C%{number}" for number in range(10, 30))
    check_bonds(chain + "C9" + "".join(f"C%{number}" for number in range(10, 30)) + "C9")


@pytest.mark.parametrize("smiles", ["*C", "C~C", "C->[Fe]", "C%(100)CC%(100)", "C" + "(C" * 2000 + ")" * 2000])
def test_what_is_not_read_is_told(smiles: str) -> None:
    assert read_bonds(as_text(smiles))[0] == -1


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_arrays_too_small_are_not_written_beyond(rows: int) -> None:
    text = as_text("C1CC1")
    bonds = np.full((5, 2), -7, dtype=np.int32)
    scratch = [np.empty(3, dtype=dtype) for dtype in (np.int32, np.uint8, np.uint8)]
    found = read_layout(text, 0, len(text), *scratch, bonds[:rows], np.empty((5, 2), dtype=np.int32))
    assert found == (-1, -1)
    assert (bonds[rows:] == -7).all()
