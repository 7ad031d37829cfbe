"""Standardisation: against RDKit's one-shot functions, by hand, and on real molecules that it settles."""

import re
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from rdkit import Chem, RDConfig, rdBase
from rdkit.Chem.MolStandardize import rdMolStandardize

from data_pipeline.build import PrepareOptions, prepare
from data_pipeline.errors import UsageError
from data_pipeline.manifest import Manifest
from data_pipeline.molecules import standardize
from data_pipeline.molecules.chemistry import canonical_molecule
from data_pipeline.molecules.encode import EncodedRows, encode_rows
from data_pipeline.molecules.normalizations import NORMALIZATIONS
from data_pipeline.molecules.rejects import MoleculeReject
from data_pipeline.molecules.standardize import standardizer

# A molecule for each normalisation that RDKit can read such a molecule for.
TO_NORMALIZE = [
    *("C[As](=O)=O", "C[Sb](=S)=O", "C[S+2](C)([O-])[O-]", "CS(C)=O", "CCS(=O)CC(N)C(=O)O", "C[P+](C)([O-])[O-]"),
    *("C[C+](N)N", "C[S+](N)N", "C[P+](C)(N)N", "CNNC[N+]#N", "C[N-]C=[N+](C)C", "C[NH+]=C[O-]", "[O-]c1cccc[nH+]1"),
    *("C[N-]C=CC=[N+](C)C", "C[n+]1ccc([O-])cc1", "CNC=[N+](C)C", "CN1C=CC(=[N+](C)C)N1", "CNC=CC=[N+](C)C"),
    *("C[N+](C)=c1cc[nH]cc1", "C[NH+]=c1cccc[n-]1", "[N-]=[C+]C"),
]
ELEMENTS = ("C", "N", "O", "P", "S", "Se", "Cl", "As", "Sb")


def standard(text: str) -> str:
    with rdBase.BlockLogs():
        return standardizer().standardize(canonical_molecule(text, max_atoms=512)).smiles


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CCO", "CCO"),
        ("CC(=O)[O-].[Na+]", "CC(=O)O"),
        ("c1ccccc1C[NH3+].[Cl-]", "NCc1ccccc1"),
        ("Cl.CN(C)CCc1ccccc1", "CN(C)CCc1ccccc1"),
        ("CN(=O)=O", "C[N+](=O)[O-]"),
        ("C[N+](=O)[O-]", "C[N+](=O)[O-]"),
        ("[NH3+]CC(=O)[O-]", "NCC(=O)O"),
        ("C[N+](C)(C)CC(=O)[O-]", "C[N+](C)(C)CC(=O)[O-]"),
        ("C[N+](C)(C)CCO.[Cl-]", "C[N+](C)(C)CCO"),
        ("[Cl-].CC(=O)OCC[N+](C)(C)C.O", "CC(=O)OCC[N+](C)(C)C"),
        ("O=[N+]([O-])c1cc[n+]([O-])cc1", "O=[N+]([O-])c1cc[n+]([O-])cc1"),
        ("CN=[N+]=[N-]", "CN=[N+]=[N-]"),
        ("CS(C)=O", "C[S+](C)[O-]"),
        ("CS(C)(=O)=O", "CS(C)(=O)=O"),
        # Isotopes, radicals and tautomers stay.
        ("[13CH3][NH3+]", "[13CH3]N"),
        ("[2H]OC", "[2H]OC"),
        ("[CH2]C", "[CH2]C"),
        ("CC(O)=CC", "CC=C(C)O"),
        ("O=c1cccc[nH]1", "O=c1cccc[nH]1"),
        # Stereo stays; a nitrogen that is no centre once it is neutral loses its mark.
        ("C[C@H]([NH3+])C(=O)[O-]", "C[C@H](N)C(=O)O"),
        ("C[N@@H+](CC)Cc1ccccc1", "CCN(C)Cc1ccccc1"),
        # The largest fragment has most atoms, hydrogens included; then the greatest weight; then the first SMILES.
        ("[NH4+].[O-][N+](=O)[O-]", "N"),
        ("[Na+].[Cl-]", "Cl"),
        ("[Ca+2].[Cl-].[Cl-]", "[Ca+2]"),
        ("[Na+]", "[Na+]"),
        ("OCC.CCN", "CCN"),
        ("CCCN.CCCO", "CCCN"),
        ("NCCC.NCCC", "CCCN"),
        # A metal bound by a bond stays bound.
        ("CC(=O)O[Na]", "CC(=O)[O][Na]"),
        # One charge must stay; which of equal ones does not depend on the spelling.
        ("C[N+](C)(C)CC(C(=O)[O-])CC(=O)[O-].[Na+]", "C[N+](C)(C)CC(CC(=O)O)C(=O)[O-]"),
        ("[O-]C(=O)CC(C([O-])=O)C[N+](C)(C)C", "C[N+](C)(C)CC(CC(=O)O)C(=O)[O-]"),
    ],
)
def test_standard_form(text: str, expected: str) -> None:
    assert standard(text) == expected
    assert standard(expected) == expected


@pytest.mark.parametrize("text", TO_NORMALIZE)
def test_normalisation_is_rdkits(text: str) -> None:
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(text)
        normal = Chem.MolToSmiles(rdMolStandardize.Normalizer().normalize(mol))
        uncharged = Chem.MolToSmiles(rdMolStandardize.Uncharger().uncharge(Chem.MolFromSmiles(normal)))
    assert normal != Chem.MolToSmiles(mol)
    assert standard(text) == uncharged


def test_each_normalisation_has_a_molecule() -> None:
    mols = [Chem.MolFromSmiles(text) for text in TO_NORMALIZE]
    for name, reaction in NORMALIZATIONS:
        pattern = Chem.MolFromSmarts(reaction.split(">>")[0])
        # RDKit's parser itself mends or refuses these.
        read_by_none = name.startswith(("Pyridine", "Azide", "Diazo", "Charge normalization"))
        read_by_none |= reaction.startswith(("[n,o,p,s;-1:1]:[a:2]:[a:3]", "[N,O,P,S;-1:1]-[c:2]:[a:3]"))
        assert read_by_none or any(mol.HasSubstructMatch(pattern) for mol in mols), (name, reaction)


@pytest.mark.parametrize(
    "text", ["CC(=O)[O-].[Na+]", "Cl.CN(C)CCc1ccccc1", "CCO", "OC(=O)C[NH3+].[Br-]", "C[N+](C)(C)CCO.[Cl-]"]
)
def test_agrees_with_charge_parent(text: str) -> None:
    with rdBase.BlockLogs():
        assert standard(text) == Chem.MolToSmiles(rdMolStandardize.ChargeParent(Chem.MolFromSmiles(text)))


@pytest.mark.parametrize("text", ["CCN.CCO.CCCC", "O.O.c1ccccc1", "CCO.CCCO.CCO"])
def test_agrees_with_fragment_parent(text: str) -> None:
    with rdBase.BlockLogs():
        assert standard(text) == Chem.MolToSmiles(rdMolStandardize.FragmentParent(Chem.MolFromSmiles(text)))


def test_stored_molecules_are_their_own_standard_form(real_rows: EncodedRows) -> None:
    smiles = real_rows.batch.column("smiles").to_pylist()
    assert real_rows.standardized > 300
    check_settled(smiles)


def test_prefilter_misses_no_molecule() -> None:
    """What RDKit's steps, run on every molecule, change, is changed; all else is untouched. And all of it settles."""
    largest, normalizer = rdMolStandardize.LargestFragmentChooser(), rdMolStandardize.Normalizer()
    uncharger = rdMolStandardize.Uncharger()
    texts = [line.split()[0] for line in (Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()]
    encoded = encode_rows(texts, texts)
    changed = 0
    with rdBase.BlockLogs():
        for index, smiles in zip(encoded.kept.tolist(), encoded.batch.column("smiles").to_pylist(), strict=True):
            mol = Chem.MolFromSmiles(texts[index])
            before = Chem.MolToSmiles(mol)
            after = Chem.MolToSmiles(uncharger.uncharge(normalizer.normalize(largest.choose(mol))))
            changed += after != before
            assert (smiles == before) == (after == before)
    assert encoded.standardized == changed > 100
    check_settled(encoded.batch.column("smiles").to_pylist())


def check_settled(molecules: list[str]) -> None:
    with rdBase.BlockLogs():
        for smiles in molecules:
            molecule = canonical_molecule(smiles, max_atoms=512)
            assert molecule.smiles == smiles
            assert standardizer().standardize(molecule).smiles == smiles


def demands_a_charge(atom: Chem.Atom) -> bool:
    """True if the atom's query has a nonzero charge as a condition, outside of any "or"."""
    inside_or = None
    for line in atom.DescribeQuery().splitlines():
        depth = len(line) - len(line.lstrip())
        if inside_or is not None and depth > inside_or:
            continue
        inside_or = depth if line.strip() == "AtomOr" else None
        if re.fullmatch(r"AtomFormalCharge -?[1-9] = val", line.strip()):
            return True
    return False


class NeutralAtom(NamedTuple):
    symbol: str
    aromatic: bool
    hydrogens: int
    carbons: int  # that it is bound to, outside the pattern


def neutral_atoms(query: Chem.Atom) -> list[NeutralAtom]:
    """Neutral atoms of the elements a query names, in many surroundings; in one, where it names hardly any element."""
    element = Chem.MolFromSmarts(re.sub(r"[;&]?(X3|H0|\+0)", "", query.GetSmarts()))
    found = []
    for atom in map(NeutralAtom._make, product(ELEMENTS, (False, True), (0, 1), (0, 1, 2))):
        if instance(element, (atom,)).HasSubstructMatch(element):
            found.append(atom)
    return found if len(found) < 40 else [atom for atom in found if (atom.hydrogens, atom.carbons) == (0, 0)]


def instance(pattern: Chem.Mol, atoms: tuple[NeutralAtom, ...]) -> Chem.Mol:
    """The pattern's graph with these atoms, not sanitised."""
    mol = Chem.RWMol()
    for atom in atoms:
        added = mol.GetAtomWithIdx(mol.AddAtom(Chem.Atom(atom.symbol)))
        added.SetNoImplicit(True)
        added.SetNumExplicitHs(atom.hydrogens)
        added.SetIsAromatic(atom.aromatic)
    for bond in pattern.GetBonds():
        order = {"=": Chem.BondType.DOUBLE, "#": Chem.BondType.TRIPLE}.get(bond.GetSmarts(), Chem.BondType.SINGLE)
        mol.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), order)
    for index, atom in enumerate(atoms):
        # An aromatic atom lies in a ring: it has two aromatic bonds.
        orders = [Chem.BondType.SINGLE] * atom.carbons + [Chem.BondType.AROMATIC] * 2 * atom.aromatic
        for order in orders:
            mol.AddBond(index, mol.AddAtom(Chem.Atom("C")), order)
    mol.UpdatePropertyCache(strict=False)
    return mol


@pytest.mark.parametrize(("name", "reaction"), NORMALIZATIONS)
def test_prefilter_is_necessary_for_each_normalisation(name: str, reaction: str) -> None:
    """A normalisation demands a charge, or what it matches among neutral atoms passes the prefilter."""
    pattern = Chem.MolFromSmarts(reaction.split(">>")[0])
    if any(demands_a_charge(atom) for atom in pattern.GetAtoms()):
        return
    matches = 0
    for atoms in product(*map(neutral_atoms, pattern.GetAtoms())):
        mol = instance(pattern, atoms)
        if mol.HasSubstructMatch(pattern):
            matches += 1
            assert mol.HasSubstructMatch(standardize._MAY_CHANGE), atoms
    assert matches


def test_a_failure_inside_rdkit_is_a_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    (reject,) = encode_rows(["[Fe+2].c1cc[cH-]c1.c1cc[cH-]c1"], ["ferrocene"]).rejects
    assert reject.reason == "standardize"
    failing = standardize.Standardizer()
    failing._uncharger = Failing()
    monkeypatch.setattr("data_pipeline.molecules.encode.standardizer", lambda: failing)
    encoded = encode_rows(["CC[NH3+]", "CCN"], ["a", "b"])
    assert [reject.reason for reject in encoded.rejects] == ["standardize"]
    assert encoded.kept.tolist() == [1]


class Failing:
    def uncharge(self, mol: Chem.Mol) -> Chem.Mol:
        raise RuntimeError("Invariant Violation")


class Restless:
    def uncharge(self, mol: Chem.Mol) -> Chem.Mol:
        return Chem.MolFromSmiles(Chem.MolToSmiles(mol) + "C")


def test_what_never_settles_is_a_reject() -> None:
    restless = standardize.Standardizer()
    restless._uncharger = Restless()
    with rdBase.BlockLogs(), pytest.raises(MoleculeReject, match="unsettled"):
        restless.standardize(canonical_molecule("C[N+](C)(C)C", max_atoms=512))


@pytest.mark.parametrize("on", [True, False])
def test_prepare_counts_what_it_changed(tmp_path: Path, on: bool) -> None:
    (tmp_path / "a.smi").write_text("CC(=O)[O-].[Na+]\nCC(=O)O\nCCO\nCC[NH3+]\nnonsense\n")
    manifest = prepare([str(tmp_path / "a.smi")], tmp_path / "out", PrepareOptions(standardize=on)).manifest
    assert manifest == Manifest.load(tmp_path / "out")
    assert manifest.options["standardize"] is on
    counts = manifest.counts
    assert (counts.standardized, counts.duplicates, counts.written["train"]) == ((2, 1, 3) if on else (0, 0, 4))
    assert counts.unaccounted == 0
    with pytest.raises(UsageError, match="other options"):
        prepare([str(tmp_path / "a.smi")], tmp_path / "out", PrepareOptions(standardize=not on))


def test_switched_off_rows_are_as_written() -> None:
    texts = ["CC(=O)[O-].[Na+]", "CS(C)=O", "CC[NH3+]"]
    encoded = encode_rows(texts, texts, standardize=False)
    assert encoded.batch.column("smiles").to_pylist() == [Chem.CanonSmiles(text) for text in texts]
    assert encoded.standardized == 0
