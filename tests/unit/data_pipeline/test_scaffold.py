"""Scaffold keys, generic keys and masks against RDKit's own functions."""

import hashlib

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem.Scaffolds import MurckoScaffold

from data_pipeline.molecules.encode import EncodedRows
from data_pipeline.molecules.scaffold import ACYCLIC_KEY, murcko_scaffold, scaffold_identity


def assert_same_classes(keys: list, classes: list) -> None:
    """Two labellings of the same things cut them into the same classes."""
    pairs = len(set(zip(keys, classes, strict=True)))
    assert pairs == len(set(keys)) == len(set(classes))


def rdkit_generic_smiles(mol: Chem.Mol) -> str | None:
    """RDKit's generic scaffold, spelled canonically; None where RDKit's function fails or leaves a radical."""
    try:
        generic = MurckoScaffold.MakeScaffoldGeneric(MurckoScaffold.GetScaffoldForMol(mol))
    except Chem.MolSanitizeException:
        return None
    # Bond stereo left behind makes two spellings of one skeleton: read it again, and write it without.
    again = Chem.MolFromSmiles(Chem.MolToSmiles(generic))
    if any(atom.GetNumRadicalElectrons() for atom in again.GetAtoms()):
        return None
    return Chem.MolToSmiles(again)


def test_classes_are_rdkits_on_real_molecules(real_rows: EncodedRows) -> None:
    batch = real_rows.batch
    scaffold_keys = batch.column("scaffold_key").to_pylist()
    generic_keys = batch.column("generic_key").to_pylist()
    murcko: list[str] = []
    generic: dict[int, str] = {}
    mols = map(Chem.MolFromSmiles, batch.column("smiles").to_pylist())
    for mol, scaffold_key in zip(mols, scaffold_keys, strict=True):
        murcko.append(MurckoScaffold.MurckoScaffoldSmiles(mol=mol))
        if scaffold_key not in generic:
            generic[scaffold_key] = rdkit_generic_smiles(mol)
    assert murcko == real_rows.scaffold_smiles
    assert_same_classes(scaffold_keys, murcko)

    generic_key = dict(zip(scaffold_keys, generic_keys, strict=True))
    comparable = [key for key, smiles in generic.items() if smiles is not None]
    assert len(comparable) > 0.999 * len(generic)
    assert_same_classes([generic_key[key] for key in comparable], [generic[key] for key in comparable])


def test_mask_cuts_the_scaffold_out_of_real_molecules(real_rows: EncodedRows) -> None:
    part = real_rows.batch.slice(0, 2000)
    for row in part.to_pylist():
        mol = Chem.MolFromSmiles(row["smiles"])
        scaffold = MurckoScaffold.GetScaffoldForMol(mol)
        atoms = np.flatnonzero(row["scaffold_mask"]).tolist()
        assert len(row["scaffold_mask"]) == row["num_atoms"]
        assert len(atoms) == scaffold.GetNumAtoms()
        if atoms:
            assert skeleton(Chem.MolFragmentToSmiles(mol, atoms)) == skeleton(Chem.MolToSmiles(scaffold))


def skeleton(smiles: str) -> str:
    """Canonical SMILES of the elements and connections alone: no charge, hydrogens, stereo or bond order."""
    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    bare = Chem.RWMol()
    for atom in mol.GetAtoms():
        bare.AddAtom(Chem.Atom(atom.GetAtomicNum()))
    for bond in mol.GetBonds():
        bare.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
    bare.UpdatePropertyCache(strict=False)
    return Chem.MolToSmiles(bare)


def test_acyclic_molecule_has_no_scaffold() -> None:
    smiles, mask = murcko_scaffold(Chem.MolFromSmiles("CCO"))
    assert (smiles, mask.tolist()) == ("", [0, 0, 0])
    identity = scaffold_identity("")
    assert (identity.key, identity.generic_smiles, identity.generic_key) == (ACYCLIC_KEY, "", ACYCLIC_KEY)


def test_salt_has_a_scaffold_in_two_parts() -> None:
    smiles, mask = murcko_scaffold(Chem.MolFromSmiles("Cc1ccccc1.c1ccncc1"))
    assert smiles == "c1ccccc1.c1ccncc1"
    assert mask.tolist() == [0] + [1] * 12


@pytest.mark.parametrize(
    ("smiles", "generic"),
    [
        ("c1ccncc1", "C1CCCCC1"),
        ("O=C1CCCN1", "CC1CCCC1"),
        ("C1CCP2(C1)(CCCC2)c1ccccc1", "C1CCC(C23(CCCC2)CCCC3)CC1"),
        ("O=[n+]1[c-]cccc1", "CC1CCCCC1"),
    ],
)
def test_generic_scaffold_is_the_carbon_skeleton(smiles: str, generic: str) -> None:
    found = scaffold_identity(smiles).generic_smiles
    assert skeleton(found) == skeleton(generic)


def test_bond_stereo_does_not_split_a_generic_class() -> None:
    keys = {
        scaffold_identity(murcko_scaffold(Chem.MolFromSmiles(smiles))[0]).generic_key
        for smiles in ("O=C(/C=C/c1ccccc1)Nc1ccccc1", "O=C(/C=C\\c1ccccc1)Nc1ccccc1", "O=C(CCc1ccccc1)Nc1ccccc1")
    }
    assert len(keys) == 1


def test_keys_do_not_depend_on_the_memo() -> None:
    first = scaffold_identity("c1ccc2[nH]ccc2c1")
    scaffold_identity.cache_clear()
    assert scaffold_identity("c1ccc2[nH]ccc2c1") == first
    digest = hashlib.blake2b(b"c1ccc2[nH]ccc2c1", digest_size=8).digest()
    assert first.key == int.from_bytes(digest, "little")
