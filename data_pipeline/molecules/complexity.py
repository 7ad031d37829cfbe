"""How hard a molecule is, as one number: the curriculum's measure."""

import numpy as np

_HYDROGEN = 0
# Which values of OGB's chirality and bond stereo features are a stereo element.
_IS_TETRAHEDRAL = np.array([0, 1, 1, 0, 0])  # CW, CCW
_IS_DOUBLE_BOND_STEREO = np.array([0, 1, 1, 1, 1, 0])  # Z, E, CIS, TRANS


def complexity(
    atom_features: np.ndarray,
    atom_offsets: np.ndarray,
    bond_features: np.ndarray,
    bond_offsets: np.ndarray,
    num_fragments: np.ndarray,
) -> np.ndarray:
    """Heavy atoms + 2 * independent rings + stereo elements (tetrahedral centres and Z/E double bonds): float32 [K].

    Of K molecules with N atoms and M bonds in all: atom_features uint8 [N, 9], bond_features uint8 [M, 3], the offsets
    int64 [K + 1], num_fragments int64 [K]. The measure is ours, a whole number and a property of the molecule alone;
    rarity and quantiles are a matter of the dataset. Independent rings = bonds - atoms + fragments.
    """
    heavy_atoms = _sums(atom_features[:, 0] != _HYDROGEN, atom_offsets)
    rings = np.diff(bond_offsets) - np.diff(atom_offsets) + num_fragments
    stereo = _sums(_IS_TETRAHEDRAL[atom_features[:, 1]], atom_offsets)
    stereo += _sums(_IS_DOUBLE_BOND_STEREO[bond_features[:, 1]], bond_offsets)
    return (heavy_atoms + 2 * rings + stereo).astype(np.float32)


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The sum of each molecule's values: int64 [K]."""
    totals = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=totals[1:])
    return np.diff(totals[offsets])
