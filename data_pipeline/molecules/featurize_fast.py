"""A chunk of molecules -> the arrays of `featurize`, at a tenth of its cost: RDKit's binary molecules, read by numba.

The arrays are those of the molecule that reading the canonical SMILES again would give, without reading it again: the
features come from the molecule that wrote the SMILES (`Chem.Mol.ToBinary(0)`); the order of atoms and bonds, the bonds'
direction and the chirality tags from the SMILES (`smiles_layout`). The tags of the molecule itself would not do: RDKit
may write the stereo centres of a ring all inverted, where that is the same molecule.

RDKit does not document its binary format. Whether this file still understands it is for `self_test` to say; what it
does not understand in a single molecule is flagged, and `featurize` has to do that molecule:
dummy atoms, hydrogen atoms, radicals, atom maps, query atoms, residue information; bonds other than single, double,
triple, aromatic; stereo beyond centres of four neighbours and Z/E double bonds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from rdkit import Chem

from data_pipeline.molecules.chemistry import CanonicalMolecule
from data_pipeline.molecules.featurize import BOND_STEREO, BOND_TYPE, HYBRIDIZATION
from data_pipeline.molecules.smiles_layout import read_layout
from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES

_PICKLE_WITHOUT_PROPERTIES = 0
# Behind the last molecule: no molecule of the chunk can be read beyond the buffer before its end is noticed. A bond
# takes 24 bytes at most.
_PADDING = bytes(64)

# The binary format. A molecule: version (20 bytes), int32 atoms, int32 bonds, flags, then the atoms and the bonds.
_VERSION_BYTES = 20
_ATOMS_AT, _BONDS_AT, _FLAGS_AT, _BODY_AT = 20, 24, 28, 30
_BEGIN_ATOMS, _BEGIN_BONDS = 0x01, 0x0B
_SMALLEST_WIDE_MOLECULE = 256  # atoms; from here on an atom's index takes 4 bytes, not 1
# An atom: atomic number, flags, int32 which of the optional fields follow.
_ATOM_IS_AROMATIC = 0x40
_ATOM_UNKNOWN_FLAGS = 0x1E  # query, atom map, dummy label, residue information
(
    _HAS_OTHER_MASS,
    _HAS_CHARGE,
    _HAS_CHIRALITY,
    _HAS_HYBRIDIZATION,
    _HAS_EXPLICIT_HYDROGENS,
    _HAS_EXPLICIT_VALENCE,
    _HAS_IMPLICIT_HYDROGENS,
    _HAS_RADICALS,
    _HAS_ISOTOPE,
) = (1 << bit for bit in range(9))
_KNOWN_FIELDS = _HAS_CHARGE | _HAS_CHIRALITY | _HAS_HYBRIDIZATION | _HAS_EXPLICIT_HYDROGENS
_KNOWN_FIELDS |= _HAS_EXPLICIT_VALENCE | _HAS_IMPLICIT_HYDROGENS | _HAS_ISOTOPE
_LONGEST_ATOM = 16  # bytes
# A bond: begin, end, flags, and the optional fields type, direction, stereo with its atoms.
_BOND_IS_CONJUGATED = 0x20
_BOND_HAS_QUERY = 0x10
_BOND_HAS_TYPE, _BOND_HAS_DIRECTION, _BOND_HAS_STEREO = 0x08, 0x04, 0x02

_UNKNOWN = 255
_CLOCKWISE, _COUNTERCLOCKWISE = int(Chem.ChiralType.CHI_TETRAHEDRAL_CW), int(Chem.ChiralType.CHI_TETRAHEDRAL_CCW)
_SP3, _SINGLE = int(Chem.HybridizationType.SP3), int(Chem.BondType.SINGLE)
MAX_DEGREE = 16
_CENTRE_NEIGHBORS = 4
_CHARGE_LIMIT = 5
_DEGREE_MISC, _HYDROGENS_MISC = ATOM_FEATURE_SIZES[2] - 1, ATOM_FEATURE_SIZES[4] - 1
_ELEMENTS = ATOM_FEATURE_SIZES[0] - 1


def _feature_of(values: Mapping[Any, int], other: int) -> np.ndarray:
    """uint8 [256]: RDKit's number of an enumeration's value -> the feature."""
    table = np.full(256, other, dtype=np.uint8)
    for value, feature in values.items():
        table[int(value)] = feature
    return table


_HYBRIDIZATION_FEATURE = _feature_of(HYBRIDIZATION, ATOM_FEATURE_SIZES[6] - 1)
_BOND_TYPE_FEATURE = _feature_of(BOND_TYPE, _UNKNOWN)
_BOND_STEREO_FEATURE = _feature_of(BOND_STEREO, _UNKNOWN)


@dataclass(frozen=True)
class ChunkArrays:
    """K molecules with N atoms and M bonds in all, one after the other.

    atom_offsets, bond_offsets: int64 [K + 1]; atom_features: uint8 [N, 9]; bond_index: uint16 [M, 2], the atoms'
    indices inside their molecule; bond_features: uint8 [M, 3]; is_bracket: uint8 [N], the SMILES has the atom in
    brackets; hydrogens: uint8 [N]; is_exact: bool [K]: False where the molecule is left to `featurize`, and its part
    of the arrays means nothing.
    """

    atom_offsets: np.ndarray
    bond_offsets: np.ndarray
    atom_features: np.ndarray
    bond_index: np.ndarray
    bond_features: np.ndarray
    is_bracket: np.ndarray
    hydrogens: np.ndarray
    is_exact: np.ndarray


@dataclass(frozen=True)
class WrittenMolecule:
    """A sanitised molecule and its canonical SMILES, flat.

    binary: `Chem.Mol.ToBinary(0)`; order: its atoms in the order written, as text "[0,2,1,]", empty if that is theirs.
    """

    smiles: str
    binary: bytes
    order: str


def written(molecule: CanonicalMolecule) -> WrittenMolecule:
    """`molecule` flat, before its `mol` writes another SMILES."""
    smiles, mol, is_reread = molecule
    order = "" if is_reread else mol.GetProp("_smilesAtomOutputOrder")
    return WrittenMolecule(smiles, mol.ToBinary(_PICKLE_WITHOUT_PROPERTIES), order)


def featurize_chunk(molecules: Sequence[WrittenMolecule]) -> ChunkArrays:
    """The arrays of `molecules`."""
    binaries, binary_offsets = _joined([molecule.binary for molecule in molecules])
    texts, text_offsets = _joined([molecule.smiles.encode() for molecule in molecules])
    orders, order_offsets = _joined([molecule.order.encode() for molecule in molecules])
    atom_offsets, bond_offsets = (_offsets(binaries, binary_offsets, at) for at in (_ATOMS_AT, _BONDS_AT))
    chunk = _empty_chunk(atom_offsets, bond_offsets)
    _decode_chunk(
        binaries,
        binary_offsets,
        texts,
        text_offsets,
        orders,
        order_offsets,
        _version(),
        atom_offsets,
        bond_offsets,
        chunk.atom_features,
        chunk.bond_index,
        chunk.bond_features,
        chunk.is_bracket,
        chunk.hydrogens,
        chunk.is_exact,
    )
    return chunk


def unknown_chunk(count: int) -> ChunkArrays:
    """A chunk of `count` molecules that are all left to `featurize`."""
    return _empty_chunk(np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.int64))


def _empty_chunk(atom_offsets: np.ndarray, bond_offsets: np.ndarray) -> ChunkArrays:
    num_atoms, num_bonds = int(atom_offsets[-1]), int(bond_offsets[-1])
    return ChunkArrays(
        atom_offsets=atom_offsets,
        bond_offsets=bond_offsets,
        atom_features=np.zeros((num_atoms, len(ATOM_FEATURE_SIZES)), dtype=np.uint8),
        bond_index=np.zeros((num_bonds, 2), dtype=np.uint16),
        bond_features=np.zeros((num_bonds, len(BOND_FEATURE_SIZES)), dtype=np.uint8),
        is_bracket=np.zeros(num_atoms, dtype=np.uint8),
        hydrogens=np.zeros(num_atoms, dtype=np.uint8),
        is_exact=np.zeros(len(atom_offsets) - 1, dtype=np.bool_),
    )


def _version() -> np.ndarray:
    """How every binary molecule of this RDKit begins: uint8 [20]."""
    return np.frombuffer(Chem.Mol().ToBinary(_PICKLE_WITHOUT_PROPERTIES)[:_VERSION_BYTES], dtype=np.uint8)


def _joined(parts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of all parts and the padding, uint8, and where each part begins: int64 [parts + 1]."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return np.frombuffer(b"".join(parts) + _PADDING, dtype=np.uint8), offsets


def _offsets(binaries: np.ndarray, binary_offsets: np.ndarray, at: int) -> np.ndarray:
    """Offsets of the molecules' atoms or bonds, from the counts `at` in their binaries: int64 [molecules + 1].

    A count that cannot be, because the format is another one, becomes 0; `_decode_chunk` will find that out.
    """
    bytes_of_counts = binaries[binary_offsets[:-1, None] + at + np.arange(4)]
    counts = np.ascontiguousarray(bytes_of_counts).view("<i4")[:, 0].astype(np.int64)
    counts[(counts < 0) | (counts > np.diff(binary_offsets))] = 0
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])


@njit(cache=True)
def _decode_chunk(
    binaries: np.ndarray,
    binary_offsets: np.ndarray,
    texts: np.ndarray,
    text_offsets: np.ndarray,
    orders: np.ndarray,
    order_offsets: np.ndarray,
    version: np.ndarray,
    atom_offsets: np.ndarray,
    bond_offsets: np.ndarray,
    atom_features: np.ndarray,
    bond_index: np.ndarray,
    bond_features: np.ndarray,
    is_bracket: np.ndarray,
    hydrogens: np.ndarray,
    is_exact: np.ndarray,
) -> None:
    most_atoms, most_bonds = longest(atom_offsets), longest(bond_offsets)
    place = np.empty(most_atoms, dtype=np.int32)
    parents = np.empty(most_atoms, dtype=np.int32)
    marks = np.empty(most_atoms, dtype=np.uint8)
    chirality = np.empty(most_atoms, dtype=np.uint8)
    written_ends = np.empty((most_bonds, 2), dtype=np.int32)
    written_at = np.empty((most_bonds, 2), dtype=np.int32)
    own_ends = np.empty((most_bonds, 2), dtype=np.int32)
    own_features = np.empty((most_bonds, 3), dtype=np.uint8)
    own_bonds = np.empty((most_atoms, MAX_DEGREE), dtype=np.int32)
    degree = np.empty(most_atoms, dtype=np.int32)
    for index in range(len(is_exact)):
        first_atom, end_atom = atom_offsets[index], atom_offsets[index + 1]
        first_bond, end_bond = bond_offsets[index], bond_offsets[index + 1]
        n, m = end_atom - first_atom, end_bond - first_bond
        atoms, bonds = read_layout(
            texts,
            text_offsets[index],
            text_offsets[index + 1],
            parents[:n],
            is_bracket[first_atom:end_atom],
            marks,
            written_ends[:m],
            written_at,
        )
        if atoms != n or bonds != m:
            continue
        if not _read_order(orders, order_offsets[index], order_offsets[index + 1], place[:n]):
            continue
        features = atom_features[first_atom:end_atom]
        is_known = _decode(
            binaries,
            binary_offsets[index],
            binary_offsets[index + 1],
            version,
            place[:n],
            features,
            hydrogens[first_atom:end_atom],
            chirality,
            own_ends[:m],
            own_features,
        )
        if not is_known:
            continue
        if not _list_bonds(own_ends[:m], own_bonds, degree[:n]):
            continue
        if not _write_bonds(
            written_ends[:m],
            own_ends,
            own_features,
            own_bonds,
            degree,
            bond_index[first_bond:end_bond],
            bond_features[first_bond:end_bond],
        ):
            continue
        is_known = _write_chirality(
            parents[:n], marks, written_ends[:m], written_at, hydrogens[first_atom:end_atom], chirality, features
        )
        if not is_known:
            continue
        for atom in range(n):
            features[atom, 2] = min(degree[atom] + hydrogens[first_atom + atom], _DEGREE_MISC)
        _mark_rings(parents[:n], written_ends[:m], features)
        is_exact[index] = True


@njit(cache=True)
def longest(offsets: np.ndarray) -> int:
    """The largest distance between an offset and the next."""
    found = 0
    for index in range(len(offsets) - 1):
        found = max(found, offsets[index + 1] - offsets[index])
    return found


@njit(cache=True)
def _int32(data: np.ndarray, at: int) -> int:
    low = np.int64(data[at]) | np.int64(data[at + 1]) << 8 | np.int64(data[at + 2]) << 16
    return low | np.int64(np.int8(data[at + 3])) << 24


@njit(cache=True)
def _read_order(orders: np.ndarray, start: int, stop: int, place: np.ndarray) -> bool:
    """Read "[2,0,1,]" into place: atom 2 is written first, so place[2] = 0. False unless it is a permutation."""
    if start == stop:
        for atom in range(len(place)):
            place[atom] = atom
        return True
    place[:] = -1
    number, digits, count = 0, 0, 0
    for position in range(start + 1, stop):
        char = orders[position]
        if 48 <= char <= 57:
            number = 10 * number + char - 48
            digits += 1
        elif digits:
            if number >= len(place) or place[number] >= 0:
                return False
            place[number] = count
            count += 1
            number, digits = 0, 0
    return count == len(place)


@njit(cache=True)
def _decode(
    data: np.ndarray,
    start: int,
    stop: int,
    version: np.ndarray,
    place: np.ndarray,
    features: np.ndarray,
    hydrogens: np.ndarray,
    chirality: np.ndarray,
    ends: np.ndarray,
    bond_features: np.ndarray,
) -> bool:
    """Read the binary molecule `data[start:stop]`; False if it has anything unknown.

    Atom i goes to row place[i] of features, hydrogens and chirality; bonds stay in their order, with their ends
    renumbered by place. Degree, chirality and ring are not among the features written here.
    """
    for offset in range(_VERSION_BYTES):
        if data[start + offset] != version[offset]:
            return False
    at = start + _BODY_AT
    if data[at - 1] != _BEGIN_ATOMS:
        return False
    num_atoms = len(place)
    for atom in range(num_atoms):
        if at + _LONGEST_ATOM > stop:
            return False
        row = place[atom]
        element, flags, fields = data[at], data[at + 1], _int32(data, at + 2)
        at += 6
        if flags & _ATOM_UNKNOWN_FLAGS or fields & ~_KNOWN_FIELDS or not 2 <= element <= _ELEMENTS:
            return False
        charge, hybridization, hydrogen_count = np.int64(0), np.int64(_SP3), np.int64(0)
        chirality[row] = 0
        if fields & _HAS_CHARGE:
            charge = np.int64(np.int8(data[at]))
            at += 1
        if fields & _HAS_CHIRALITY:
            chirality[row] = data[at]
            at += 1
        if fields & _HAS_HYBRIDIZATION:
            hybridization = np.int64(data[at])
            at += 1
        if fields & _HAS_EXPLICIT_HYDROGENS:
            hydrogen_count += data[at]
            at += 1
        if fields & _HAS_EXPLICIT_VALENCE:
            at += 1
        if fields & _HAS_IMPLICIT_HYDROGENS:
            hydrogen_count += data[at]
            at += 1
        if fields & _HAS_ISOTOPE:
            at += 4
        if abs(charge) > _CHARGE_LIMIT or chirality[row] > _COUNTERCLOCKWISE or hydrogen_count >= _UNKNOWN:
            return False
        hydrogens[row] = hydrogen_count
        features[row, 0] = element - 1
        features[row, 3] = charge + _CHARGE_LIMIT
        features[row, 4] = min(hydrogen_count, _HYDROGENS_MISC)
        features[row, 5] = 0
        features[row, 6] = _HYBRIDIZATION_FEATURE[hybridization]
        features[row, 7] = (flags & _ATOM_IS_AROMATIC) != 0
    if data[at] != _BEGIN_BONDS:
        return False
    at += 1
    is_wide = num_atoms >= _SMALLEST_WIDE_MOLECULE
    width = 4 if is_wide else 1
    for bond in range(len(ends)):
        if at + 3 > stop:
            return False
        begin = _int32(data, at) if is_wide else np.int64(data[at])
        end = _int32(data, at + width) if is_wide else np.int64(data[at + width])
        if not (0 <= begin < num_atoms and 0 <= end < num_atoms):
            return False
        ends[bond, 0], ends[bond, 1] = place[begin], place[end]
        flags = data[at + 2 * width]
        at += 2 * width + 1
        kind, stereo = np.int64(_SINGLE), np.int64(0)
        if flags & _BOND_HAS_QUERY:
            return False
        if flags & _BOND_HAS_TYPE:
            kind = np.int64(data[at])
            at += 1
        if flags & _BOND_HAS_DIRECTION:
            at += 1
        if flags & _BOND_HAS_STEREO:
            stereo = np.int64(data[at])
            at += 2 + width * np.int64(data[at + 1])
        bond_features[bond, 0] = _BOND_TYPE_FEATURE[kind]
        bond_features[bond, 1] = _BOND_STEREO_FEATURE[stereo]
        bond_features[bond, 2] = (flags & _BOND_IS_CONJUGATED) != 0
        if bond_features[bond, 0] == _UNKNOWN or bond_features[bond, 1] == _UNKNOWN:
            return False
    return at <= stop


@njit(cache=True)
def _list_bonds(ends: np.ndarray, bonds: np.ndarray, degree: np.ndarray) -> bool:
    """The bonds of each atom, ascending, into its row of bonds; False if an atom has too many."""
    degree[:] = 0
    for bond in range(len(ends)):
        for side in range(2):
            atom = ends[bond, side]
            if degree[atom] == MAX_DEGREE:
                return False
            bonds[atom, degree[atom]] = bond
            degree[atom] += 1
    return True


@njit(cache=True)
def _write_bonds(
    written_ends: np.ndarray,
    own_ends: np.ndarray,
    own_features: np.ndarray,
    own_bonds: np.ndarray,
    degree: np.ndarray,
    bond_index: np.ndarray,
    bond_features: np.ndarray,
) -> bool:
    """The written bonds with the features of the molecule's own; False if one of them is not there."""
    for bond in range(len(written_ends)):
        begin, end = written_ends[bond, 0], written_ends[bond, 1]
        own = -1
        for position in range(degree[begin]):
            candidate = own_bonds[begin, position]
            if own_ends[candidate, 0] == end or own_ends[candidate, 1] == end:
                own = candidate
        if own < 0:
            return False
        bond_index[bond, 0], bond_index[bond, 1] = begin, end
        for feature in range(bond_features.shape[1]):
            bond_features[bond, feature] = own_features[own, feature]
    return True


@njit(cache=True)
def _write_chirality(
    parents: np.ndarray,
    marks: np.ndarray,
    written_ends: np.ndarray,
    written_at: np.ndarray,
    hydrogens: np.ndarray,
    chirality: np.ndarray,
    features: np.ndarray,
) -> bool:
    """The chirality tags that the marks stand for; False where molecule and SMILES disagree on what is a centre.

    A mark refers to the order in which the neighbours are written, a hydrogen before all but the atom read before;
    the tag to the order of the bonds, a hydrogen first. They differ by an even or an odd permutation.
    """
    position = np.empty(MAX_DEGREE, dtype=np.int32)
    for atom in range(len(parents)):
        if (chirality[atom] != 0) != (marks[atom] != 0):
            return False
        if marks[atom] == 0:
            features[atom, 1] = 0
            continue
        swaps = hydrogens[atom] != 0 and parents[atom] < 0
        count = 0
        for bond in range(len(written_ends)):
            for side in range(2):
                if written_ends[bond, side] == atom:
                    position[count] = written_at[bond, side]
                    for before in range(count):
                        swaps += position[before] > position[count]
                    count += 1
        if count + hydrogens[atom] != _CENTRE_NEIGHBORS:
            # RDKit reads the marks of nitrogen, phosphorus, sulfur with a lone pair by rules of its own.
            return False
        is_clockwise = (marks[atom] == 2) != (swaps % 2 == 1)
        features[atom, 1] = _CLOCKWISE if is_clockwise else _COUNTERCLOCKWISE
    return True


@njit(cache=True)
def _mark_rings(parents: np.ndarray, ends: np.ndarray, features: np.ndarray) -> None:
    """The feature "in a ring": the atoms on the way between the ends of each closure, along the spanning tree."""
    features[:, 8] = 0
    for bond in range(len(ends)):
        low, high = min(ends[bond, 0], ends[bond, 1]), max(ends[bond, 0], ends[bond, 1])
        if parents[high] == low:
            continue
        features[low, 8] = 1
        features[high, 8] = 1
        while low != high:
            if high < low:
                low, high = high, low
            high = parents[high]
            features[high, 8] = 1
