"""A molecule -> atom and bond arrays: the 9 + 3 features of the Open Graph Benchmark (ogb 1.3.6), exactly.

A feature is an index into OGB's list of allowed values; where that list ends in "misc", any other value
maps there. The sizes of the lists are `schema.ATOM_FEATURE_SIZES` and `schema.BOND_FEATURE_SIZES`.
"""

from dataclasses import dataclass

import numpy as np
from rdkit import Chem

from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES

# The index of "misc" in each list that has one.
_ATOMIC_NUMBER_MISC = ATOM_FEATURE_SIZES[0] - 1
_CHIRALITY_MISC = ATOM_FEATURE_SIZES[1] - 1
_DEGREE_MISC = ATOM_FEATURE_SIZES[2] - 1
_CHARGE_MISC = ATOM_FEATURE_SIZES[3] - 1
_HYDROGENS_MISC = ATOM_FEATURE_SIZES[4] - 1
_RADICALS_MISC = ATOM_FEATURE_SIZES[5] - 1
_HYBRIDIZATION_MISC = ATOM_FEATURE_SIZES[6] - 1
_BOND_TYPE_MISC = BOND_FEATURE_SIZES[0] - 1

_CHIRALITY = {
    Chem.ChiralType.CHI_UNSPECIFIED: 0,
    Chem.ChiralType.CHI_TETRAHEDRAL_CW: 1,
    Chem.ChiralType.CHI_TETRAHEDRAL_CCW: 2,
    Chem.ChiralType.CHI_OTHER: 3,
}
HYBRIDIZATION = {
    Chem.HybridizationType.SP: 0,
    Chem.HybridizationType.SP2: 1,
    Chem.HybridizationType.SP3: 2,
    Chem.HybridizationType.SP3D: 3,
    Chem.HybridizationType.SP3D2: 4,
}
BOND_TYPE = {
    Chem.BondType.SINGLE: 0,
    Chem.BondType.DOUBLE: 1,
    Chem.BondType.TRIPLE: 2,
    Chem.BondType.AROMATIC: 3,
}
_STEREO_ANY = 5
BOND_STEREO = {
    Chem.BondStereo.STEREONONE: 0,
    Chem.BondStereo.STEREOZ: 1,
    Chem.BondStereo.STEREOE: 2,
    Chem.BondStereo.STEREOCIS: 3,
    Chem.BondStereo.STEREOTRANS: 4,
    Chem.BondStereo.STEREOANY: _STEREO_ANY,
}


@dataclass(frozen=True)
class MoleculeArrays:
    """A molecule with n atoms and m bonds as arrays.

    atom_features: uint8 [n, 9]; bond_index: uint16 [m, 2], each bond once, in RDKit's bond order;
    bond_features: uint8 [m, 3].
    """

    atom_features: np.ndarray
    bond_index: np.ndarray
    bond_features: np.ndarray


def featurize(mol: Chem.Mol) -> MoleculeArrays:
    """The arrays of a sanitised molecule of fewer than 65,536 atoms."""
    atoms: list[int] = []
    # By index: RDKit's GetAtoms() and GetBonds() sequences are slower to walk than the molecule itself.
    for index in range(mol.GetNumAtoms()):
        atoms += _atom_features(mol.GetAtomWithIdx(index))
    bond_ends: list[int] = []
    bonds: list[int] = []
    for index in range(mol.GetNumBonds()):
        bond = mol.GetBondWithIdx(index)
        bond_ends += (bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())
        bonds += _bond_features(bond)
    return MoleculeArrays(
        np.array(atoms, dtype=np.uint8).reshape(-1, len(ATOM_FEATURE_SIZES)),
        np.array(bond_ends, dtype=np.uint16).reshape(-1, 2),
        np.array(bonds, dtype=np.uint8).reshape(-1, len(BOND_FEATURE_SIZES)),
    )


def _atom_features(atom: Chem.Atom) -> tuple[int, ...]:
    atomic_number = atom.GetAtomicNum()
    charge = atom.GetFormalCharge()
    return (
        atomic_number - 1 if 1 <= atomic_number <= _ATOMIC_NUMBER_MISC else _ATOMIC_NUMBER_MISC,
        _CHIRALITY.get(atom.GetChiralTag(), _CHIRALITY_MISC),
        min(atom.GetTotalDegree(), _DEGREE_MISC),
        charge + 5 if -5 <= charge <= 5 else _CHARGE_MISC,
        min(atom.GetTotalNumHs(), _HYDROGENS_MISC),
        min(atom.GetNumRadicalElectrons(), _RADICALS_MISC),
        HYBRIDIZATION.get(atom.GetHybridization(), _HYBRIDIZATION_MISC),
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    )


def _bond_features(bond: Chem.Bond) -> tuple[int, ...]:
    return (
        BOND_TYPE.get(bond.GetBondType(), _BOND_TYPE_MISC),
        # OGB has no entry for the stereo of an atropisomer and raises; "any" says that there is one.
        BOND_STEREO.get(bond.GetStereo(), _STEREO_ANY),
        int(bond.GetIsConjugated()),
    )
