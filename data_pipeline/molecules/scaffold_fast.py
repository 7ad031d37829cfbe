"""The Murcko scaffold of each molecule of a chunk, as the mask of its atoms and as a graph code, by numba.

The scaffold is `scaffold.murcko_scaffold`'s: the rings, what links them, and the atoms that a double bond ties to
either. What RDKit's MurckoDecompose does to the atoms that lose a neighbour is written into the labels of the code, and
RDKit writes the SMILES of a code: equal codes have equal SMILES, so a memo of codes gives the same as none.
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np
from numba import njit

from data_pipeline.molecules.code_smiles import CHARGE_OFFSET, atom_label, code_smiles
from data_pipeline.molecules.featurize_fast import MAX_DEGREE, ChunkArrays, longest
from data_pipeline.molecules.graph_code import EDGE_BYTES, VERTEX_BYTES, write_code
from data_pipeline.molecules.scaffold import MEMO_SIZE, ScaffoldIdentity, scaffold_identity, skeleton_smiles

_DOUBLE = 1  # bond feature; one less than the order
_CARBON, _NITROGEN, _OXYGEN = 6, 7, 8
_SIDE_CHAIN, _CORE, _EXOCYCLIC = 0, 1, 2


def scaffold_codes(chunk: ChunkArrays) -> tuple[np.ndarray, list[bytes]]:
    """The mask of all atoms (uint8 [N], 1 in the scaffold), and each molecule's code, empty for an acyclic molecule.

    Both mean nothing for a molecule that is not exact.
    """
    num_atoms, num_bonds = len(chunk.atom_features), len(chunk.bond_features)
    mask = np.zeros(num_atoms, dtype=np.uint8)
    codes = np.empty(VERTEX_BYTES * num_atoms + EDGE_BYTES * num_bonds, dtype=np.uint8)
    ends = np.zeros(len(chunk.is_exact) + 1, dtype=np.int64)
    _write_codes(
        chunk.atom_offsets,
        chunk.bond_offsets,
        chunk.atom_features,
        chunk.bond_index,
        chunk.bond_features,
        chunk.is_bracket,
        chunk.hydrogens,
        chunk.is_exact,
        mask,
        codes,
        ends,
    )
    content, cuts = codes[: ends[-1]].tobytes(), ends.tolist()
    return mask, [content[start:stop] for start, stop in pairwise(cuts)]


@lru_cache(maxsize=MEMO_SIZE)
def scaffold_of(code: bytes) -> ScaffoldIdentity:
    """The scaffold with this code."""
    return scaffold_identity(code_smiles(code))


def clear_scaffold_memos() -> None:
    """Forget all scaffolds, as a new process would: for measurements and tests."""
    scaffold_of.cache_clear()
    scaffold_identity.cache_clear()
    skeleton_smiles.cache_clear()


@njit(cache=True)
def _write_codes(
    atom_offsets: np.ndarray,
    bond_offsets: np.ndarray,
    atom_features: np.ndarray,
    bond_index: np.ndarray,
    bond_features: np.ndarray,
    is_bracket: np.ndarray,
    hydrogens: np.ndarray,
    is_exact: np.ndarray,
    mask: np.ndarray,
    codes: np.ndarray,
    ends: np.ndarray,
) -> None:
    most_atoms = longest(atom_offsets)
    neighbors = np.empty((most_atoms, MAX_DEGREE), dtype=np.int32)
    kinds = np.empty((most_atoms, MAX_DEGREE), dtype=np.uint8)
    degree = np.empty(most_atoms, dtype=np.int32)
    part = np.empty(most_atoms, dtype=np.uint8)
    # The same of the scaffold alone, and the number of each of its atoms there.
    number = np.empty(most_atoms, dtype=np.int32)
    labels = np.empty(most_atoms, dtype=np.uint32)
    scaffold_neighbors = np.empty((most_atoms, MAX_DEGREE), dtype=np.int32)
    scaffold_kinds = np.empty((most_atoms, MAX_DEGREE), dtype=np.uint8)
    scaffold_degree = np.empty(most_atoms, dtype=np.int32)
    for index in range(len(is_exact)):
        ends[index + 1] = ends[index]
        if not is_exact[index]:
            continue
        first, stop = atom_offsets[index], atom_offsets[index + 1]
        features = atom_features[first:stop]
        bonds = slice(bond_offsets[index], bond_offsets[index + 1])
        _list_neighbors(bond_index[bonds], bond_features[bonds], neighbors, kinds, degree[: stop - first])
        if not _find_parts(features, neighbors, kinds, degree, part[: stop - first]):
            continue
        size = 0
        for atom in range(stop - first):
            number[atom] = size
            mask[first + atom] = part[atom] != _SIDE_CHAIN
            size += mask[first + atom]
        for atom in range(stop - first):
            if part[atom] == _SIDE_CHAIN:
                continue
            vertex = number[atom]
            kept = lost_order = 0
            for slot in range(degree[atom]):
                neighbor, kind = neighbors[atom, slot], kinds[atom, slot]
                if part[neighbor] == _SIDE_CHAIN:
                    lost_order += kind + 1
                else:
                    scaffold_neighbors[vertex, kept], scaffold_kinds[vertex, kept] = number[neighbor], kind
                    kept += 1
            scaffold_degree[vertex] = kept
            labels[vertex] = _label(
                features[atom], is_bracket[first + atom], hydrogens[first + atom], part[atom] == _CORE, lost_order
            )
        ends[index + 1] = write_code(
            labels[:size], scaffold_degree, scaffold_neighbors, scaffold_kinds, codes, ends[index]
        )


@njit(cache=True)
def _list_neighbors(
    bond_index: np.ndarray, bond_features: np.ndarray, neighbors: np.ndarray, kinds: np.ndarray, degree: np.ndarray
) -> None:
    degree[:] = 0
    for bond in range(len(bond_index)):
        for side in range(2):
            atom = bond_index[bond, side]
            neighbors[atom, degree[atom]] = bond_index[bond, 1 - side]
            kinds[atom, degree[atom]] = bond_features[bond, 0]
            degree[atom] += 1


@njit(cache=True)
def _find_parts(
    features: np.ndarray, neighbors: np.ndarray, kinds: np.ndarray, degree: np.ndarray, part: np.ndarray
) -> bool:
    """Which part of the molecule each atom is; False for an acyclic molecule.

    The core is what is left after cutting off loose ends, again and again. An atom that a double bond ties to the core
    is exocyclic.
    """
    n = len(part)
    left = degree[:n].copy()
    pending = np.empty(n, dtype=np.int32)
    count = 0
    has_ring = False
    part[:] = _CORE
    for atom in range(n):
        has_ring |= features[atom, 8] == 1
        if left[atom] <= 1:
            part[atom] = _SIDE_CHAIN
            pending[count] = atom
            count += 1
    while count > 0:
        count -= 1
        atom = pending[count]
        for slot in range(degree[atom]):
            neighbor = neighbors[atom, slot]
            if part[neighbor] == _CORE:
                left[neighbor] -= 1
                if left[neighbor] <= 1:
                    part[neighbor] = _SIDE_CHAIN
                    pending[count] = neighbor
                    count += 1
    for atom in range(n):
        if part[atom] == _SIDE_CHAIN:
            for slot in range(degree[atom]):
                if kinds[atom, slot] == _DOUBLE and part[neighbors[atom, slot]] == _CORE:
                    part[atom] = _EXOCYCLIC
    return has_ring


@njit(cache=True)
def _label(features: np.ndarray, is_bracket: int, hydrogens: int, is_core: bool, lost_order: int) -> int:
    """The label of an atom of the scaffold that lost neighbours, by bonds of `lost_order` in all.

    MurckoDecompose gives an aromatic heteroatom (or carbon cation) of the core one hydrogen; other atoms of the core
    lose their brackets, so that their hydrogens are counted anew. It leaves exocyclic atoms as they are.
    """
    number, charge = np.int64(features[0]) + 1, np.int64(features[3]) - CHARGE_OFFSET
    is_aromatic = features[7] != 0
    is_open = False
    count = np.int64(hydrogens)
    if lost_order > 0:
        if is_core and is_aromatic and (number != _CARBON or charge == 1):
            count = 1
            is_open = is_bracket == 0
        elif is_core or is_bracket == 0:
            # For most atoms the new count is known here, which spares RDKit the work, and the memo a second code.
            is_known = charge == 0 and number in (_CARBON, _NITROGEN, _OXYGEN)
            count = count + lost_order if is_known else 0
            is_open = not is_known
    return atom_label(number, charge, count, is_aromatic, is_open)
