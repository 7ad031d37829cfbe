"""Codes spell graphs out: equal codes only for equal graphs, and a scaffold's code gives RDKit's Murcko SMILES."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from data_pipeline.molecules.chemistry import canonical_molecule
from data_pipeline.molecules.code_smiles import code_smiles
from data_pipeline.molecules.featurize_fast import featurize_chunk, written
from data_pipeline.molecules.scaffold_fast import scaffold_codes

# Pairs that colour refinement alone cannot tell apart: equal degrees everywhere, and different graphs.
ALIKE = [
    ("C1CCC2CCCCC2C1", "C1CCC(C1)C1CCCC1"),  # decalin, bicyclopentyl
    ("C1CCCCC1.C1CCCCC1", "C1CCCCCCCCCCC1"),
    ("C1CCC1.C1CCC1", "C1CCCCCCC1"),
    ("C12C3C4C1C5C2C3C45", "C12C3C4C5C1C6C2C5C4C36"),  # cubane, and a cage of ten atoms
    ("C1CC2CC3CCC3C2C1", "C1CC2CC3CC1C3C2"),
]


def codes(texts: list[str]) -> list[bytes]:
    with rdBase.BlockLogs():
        chunk = featurize_chunk([written(canonical_molecule(text, 512)) for text in texts])
        assert chunk.is_exact.all()
        return scaffold_codes(chunk)[1]


def murcko(text: str) -> str:
    return MurckoScaffold.MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(Chem.CanonSmiles(text)))


@pytest.mark.parametrize("pair", ALIKE)
def test_graphs_that_look_alike_have_codes_of_their_own(pair: tuple[str, str]) -> None:
    first, second = codes(list(pair))
    assert first != second
    assert [code_smiles(code) for code in (first, second)] == [murcko(text) for text in pair]


@pytest.mark.parametrize(
    "text",
    [
        *("Cn1cccc1", "C[n+]1ccccc1", "C[NH+]1CCCCC1", "C[N+]1(C)CCCCC1", "C[C@H]1CC[C@@H](O)CC1", "CS1(=O)=NCCC1"),
        *("CN=C1CCCCC1=NO", "O=S(=O)(c1ccccc1)C", "CP1(=O)CCCC1", "C[Si]1(C)CCCC1", "FS1(F)(F)CCCC1", "C[P+]1(C)CCCC1"),
        *(
            "C=[N+](C)C1CC1",
            "C[N+](C)=C1CCCCC1",
            "OB1OCCO1",
            "C[B-]1(C)OCCO1",
            "Cc1ccc[te]1",
            "CC1CC[Se]C1",
            "CC#CC1CC1",
        ),
        *(
            "[O-][n+]1ccccc1C",
            "Cc1ccccc1.c1ccncc1",
            "CC.CCO",
            "C1CC1C=C1CC1",
            "O=c1[nH]c(=O)n(C)cc1",
            "[13CH3]C1C[13CH2]1",
        ),
        *("C/C(=N\\O)C1CC1", "CC(=C1CCCC1)C1CC1", "c1ccc(cc1)C(c1ccccc1)(c1ccccc1)O", "C1CC1CC=C", "C[S+]1(=O)CCCC1"),
    ],
)
def test_smiles_of_a_code_is_murckos(text: str) -> None:
    assert code_smiles(codes([text])[0]) == murcko(text)


@settings(deadline=None, max_examples=60)
@given(st.randoms(use_true_random=False), st.integers(4, 24), st.integers(1, 8))
def test_smiles_of_a_code_is_murckos_in_random_polycycles(chance: random.Random, atoms: int, closures: int) -> None:
    mol = Chem.RWMol()
    degree = [0] * atoms
    for atom in range(atoms):
        mol.AddAtom(Chem.Atom(chance.choice([6, 6, 6, 7, 8])))
        free = [
            other
            for other in range(atom)
            if degree[other] < (2 if mol.GetAtomWithIdx(other).GetAtomicNum() == 8 else 3)
        ]
        if atom and free:
            connect(mol, degree, atom, chance.choice(free))
    for _ in range(closures):
        free = [
            atom for atom in range(atoms) if degree[atom] < (2 if mol.GetAtomWithIdx(atom).GetAtomicNum() == 8 else 3)
        ]
        if len(free) > 1:
            connect(mol, degree, *chance.sample(free, 2))
    text = Chem.MolToSmiles(mol)
    spellings = Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(text), 3, randomSeed=chance.randrange(1 << 30))
    for code in codes([text, *spellings]):
        assert code_smiles(code) == murcko(text)


def connect(mol: Chem.RWMol, degree: list[int], one: int, other: int) -> None:
    if mol.GetBondBetweenAtoms(one, other) is None:
        mol.AddBond(one, other, Chem.BondType.SINGLE)
        degree[one] += 1
        degree[other] += 1


def test_spellings_of_a_molecule_share_a_code() -> None:
    """Not a promise, but what makes a memo of codes worth having."""
    texts = ["CC(C)Cc1ccc(cc1)C(C)C(=O)NCc1ccc2[nH]ccc2c1", "O=C1CCC(N2C(=O)c3ccccc3C2=O)C(=O)N1", "C1CC2(CC1)OCCO2"]
    for text in texts:
        assert len(set(codes(list(Chem.MolToRandomSmilesVect(Chem.MolFromSmiles(text), 20, randomSeed=1))))) == 1
