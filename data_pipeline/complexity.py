"""How hard a molecule is, as one number: the curriculum's measure."""

import numpy as np

from data_pipeline.featurize import MoleculeArrays

_HYDROGEN = 0
# Which values of OGB's chirality and bond stereo features are a stereo element.
_IS_TETRAHEDRAL = np.array([0, 1, 1, 0, 0])  # CW, CCW
_IS_DOUBLE_BOND_STEREO = np.array([0, 1, 1, 1, 1, 0])  # Z, E, CIS, TRANS


def complexity(arrays: MoleculeArrays, num_fragments: int) -> int:
    """Heavy atoms + 2 * independent rings + stereo elements (tetrahedral centres and Z/E double bonds).

    The measure is ours, a whole number and a property of the molecule alone; rarity and quantiles are a matter
    of the dataset. Independent rings = bonds - atoms + fragments.
    """
    atoms, bonds = arrays.atom_features, arrays.bond_features
    heavy_atoms = np.count_nonzero(atoms[:, 0] != _HYDROGEN)
    rings = len(bonds) - len(atoms) + num_fragments
    stereo = _IS_TETRAHEDRAL[atoms[:, 1]].sum() + _IS_DOUBLE_BOND_STEREO[bonds[:, 1]].sum()
    return int(heavy_atoms + 2 * rings + stereo)
