"""Bemis-Murcko scaffold of a molecule: SMILES, keys, generic form, and which atoms belong to it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from rdkit import Chem

from data_pipeline.keys import digest64

ACYCLIC_KEY = 0

_ATOM_INDEX = "_scaffold_atom_index"
_CARBON = Chem.Atom(6)
_MEMO_SIZE = 1 << 17  # scaffolds; about 50 MB in each process


@dataclass(frozen=True)
class ScaffoldIdentity:
    """What follows from the SMILES of a scaffold alone. `key` and `generic_key` are 64-bit; 0 = acyclic."""

    key: int
    generic_smiles: str
    generic_key: int


def murcko_scaffold(mol: Chem.Mol) -> tuple[str, np.ndarray]:
    """Murcko scaffold SMILES without stereo ('' when acyclic), and the mask of its atoms: uint8 [n].

    The SMILES is the one of `rdkit.Chem.Scaffolds.MurckoScaffold.MurckoScaffoldSmiles`. Leaves an integer
    property on the atoms of `mol`.
    """
    for index in range(mol.GetNumAtoms()):
        mol.GetAtomWithIdx(index).SetIntProp(_ATOM_INDEX, index)
    scaffold = Chem.MurckoDecompose(mol)
    mask = np.zeros(mol.GetNumAtoms(), dtype=np.uint8)
    for index in range(scaffold.GetNumAtoms()):
        mask[scaffold.GetAtomWithIdx(index).GetIntProp(_ATOM_INDEX)] = 1
    return Chem.MolToSmiles(scaffold, isomericSmiles=False), mask


@lru_cache(maxsize=_MEMO_SIZE)
def scaffold_identity(scaffold_smiles: str) -> ScaffoldIdentity:
    """The keys of a scaffold, from its SMILES and nothing else, so that no order of work can change them."""
    generic_smiles = _generic_smiles(scaffold_smiles)
    return ScaffoldIdentity(_smiles_key(scaffold_smiles), generic_smiles, _smiles_key(generic_smiles))


def _smiles_key(smiles: str) -> int:
    if not smiles:
        return ACYCLIC_KEY
    # 0 is taken by "acyclic".
    return digest64(smiles.encode()) or 1


def _generic_smiles(scaffold_smiles: str) -> str:
    """Canonical SMILES of the scaffold's skeleton: every atom a carbon, every bond single.

    The classes are those of RDKit's `MakeScaffoldGeneric`. The skeleton is built anew because that function
    fails on a hypervalent atom, and leaves bond stereo and radicals behind that split a class by spelling.
    """
    scaffold = Chem.MolFromSmiles(scaffold_smiles, sanitize=False)
    if scaffold is None:
        raise ValueError(f"RDKit cannot read the scaffold SMILES it wrote: {scaffold_smiles}")
    skeleton = Chem.RWMol()
    for _ in range(scaffold.GetNumAtoms()):
        skeleton.AddAtom(_CARBON)
    for bond in scaffold.GetBonds():
        skeleton.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), Chem.BondType.SINGLE)
    # Not sanitised: a carbon with the six neighbours of a metal is a fine skeleton, but not a fine molecule.
    skeleton.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(skeleton)
    return Chem.MolToSmiles(skeleton)
