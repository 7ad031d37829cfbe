"""Bemis-Murcko scaffold of a molecule: SMILES, keys, generic form, and which atoms belong to it."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit
from rdkit import Chem

from data_pipeline.keys import digest64
from data_pipeline.molecules.code_smiles import atom_label, code_smiles
from data_pipeline.molecules.graph_code import EDGE_BYTES, VERTEX_BYTES, write_code
from data_pipeline.molecules.smiles_layout import read_bonds

ACYCLIC_KEY = 0
# Scaffolds that each memo holds.
MEMO_SIZE = 1 << 16

_ATOM_INDEX = "_scaffold_atom_index"
_CARBON = 6


@dataclass(frozen=True, slots=True)
class ScaffoldIdentity:
    """What follows from the SMILES of a scaffold alone. `key` and `generic_key` are 64-bit; 0 = acyclic."""

    smiles: str
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


@lru_cache(maxsize=MEMO_SIZE)
def scaffold_identity(scaffold_smiles: str) -> ScaffoldIdentity:
    """The keys of a scaffold, from its SMILES and nothing else, so that no order of work can change them."""
    generic_smiles = skeleton_smiles(_skeleton(scaffold_smiles))
    return ScaffoldIdentity(scaffold_smiles, _smiles_key(scaffold_smiles), generic_smiles, _smiles_key(generic_smiles))


def _smiles_key(smiles: str) -> int:
    if not smiles:
        return ACYCLIC_KEY
    # 0 is taken by "acyclic".
    return digest64(smiles.encode()) or 1


@lru_cache(maxsize=MEMO_SIZE)
def skeleton_smiles(code: bytes) -> str:
    """Canonical SMILES of a scaffold's skeleton: every atom a carbon, every bond single.

    The classes are those of RDKit's `MakeScaffoldGeneric`. The skeleton is built anew because that function
    fails on a hypervalent atom, and leaves bond stereo and radicals behind that split a class by spelling. Nor is it
    sanitised: a carbon with the six neighbours of a metal is a fine skeleton, but not a fine molecule.
    """
    return code_smiles(code)


def _skeleton(scaffold_smiles: str) -> bytes:
    """The graph code of a scaffold's skeleton."""
    code = _skeleton_of_text(np.frombuffer(scaffold_smiles.encode(), dtype=np.uint8))
    if len(code) or not scaffold_smiles:
        return code.tobytes()
    scaffold = Chem.MolFromSmiles(scaffold_smiles, sanitize=False)
    if scaffold is None:
        raise ValueError(f"RDKit cannot read the scaffold SMILES it wrote: {scaffold_smiles}")
    ends = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in scaffold.GetBonds()]
    return _skeleton_of_bonds(scaffold.GetNumAtoms(), np.array(ends, dtype=np.int32).reshape(-1, 2)).tobytes()


@njit(cache=True)
def _skeleton_of_text(smiles: np.ndarray) -> np.ndarray:
    """The code of the skeleton of a SMILES (uint8): uint8, empty where `read_layout` cannot read it."""
    num_atoms, bonds = read_bonds(smiles)
    return _skeleton_of_bonds(max(num_atoms, 0), bonds)


@njit(cache=True)
def _skeleton_of_bonds(num_atoms: int, bonds: np.ndarray) -> np.ndarray:
    """The code of a graph of carbons and single bonds: uint8."""
    degree = np.zeros(num_atoms, dtype=np.int32)
    for bond in range(len(bonds)):
        degree[bonds[bond, 0]] += 1
        degree[bonds[bond, 1]] += 1
    largest = 0
    for atom in range(num_atoms):
        largest = max(largest, degree[atom])
    neighbors = np.empty((num_atoms, largest), dtype=np.int32)
    degree[:] = 0
    for bond in range(len(bonds)):
        for side in range(2):
            atom = bonds[bond, side]
            neighbors[atom, degree[atom]] = bonds[bond, 1 - side]
            degree[atom] += 1
    labels = np.full(num_atoms, atom_label(_CARBON, 0, 0, False, True), dtype=np.uint32)
    kinds = np.zeros(neighbors.shape, dtype=np.uint8)
    code = np.empty(VERTEX_BYTES * num_atoms + EDGE_BYTES * len(bonds), dtype=np.uint8)
    write_code(labels, degree, neighbors, kinds, code, np.int64(0))  # a literal would be compiled for
    return code
