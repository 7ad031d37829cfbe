"""MolBatch: molecules packed into one graph, without padding; gathered from mapped shards in one pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple, Protocol

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Batch, Data

from data_pipeline.schema import DESCRIPTORS, FINGERPRINT_BINS
from hmoe_ds.data.ahead import prefetch
from hmoe_ds.data.runs import spans
from hmoe_ds.data.store import Shard


class MoleculeStore(Protocol):
    """What a batch can be gathered from: `ShardStore`, `Mixture` or `BatchStore`."""

    @property
    def with_targets(self) -> bool: ...

    @property
    def row_start(self) -> NDArray[np.int64]: ...

    def shard(self, index: int) -> Shard: ...


class MoleculeTargets(NamedTuple):
    """What molecule-level objectives predict of B molecules.

    Attributes:
        fingerprint_BV: uint8, counts of the Morgan fingerprint in its V bins; all 0 = not known.
        descriptors_BT: fp32, the T descriptors of `data_pipeline.schema.DESCRIPTORS`; NaN = not known.
    """

    fingerprint_BV: Tensor
    descriptors_BT: Tensor


class Masks(NamedTuple):
    """What is hidden from the model: atoms (bool, N) and bonds (bool, M)."""

    atom_N: Tensor
    bond_M: Tensor


@dataclass(frozen=True)
class MolBatch:
    """B molecules with N atoms and M bonds in all.

    Args:
        atom_features_N9: uint8, Open Graph Benchmark atom feature indices.
        edge_index_2M: int64, both directions of each bond; bond j has the directed edges 2j and 2j + 1.
        bond_features_M3: uint8, Open Graph Benchmark bond feature indices, each bond once.
        molecule_N: int64, the molecule of each atom, ascending.
        ptr_B: int64, length B + 1: the first atom of each molecule, then N.
        scaffold_mask_N: bool, the atom belongs to its molecule's Murcko scaffold.
        scaffold_key_B: int64 (the bits of a uint64); 0 = acyclic.
        generic_key_B: int64, likewise.
        mol_key_B2: int64, the two halves of the 128-bit identity.
        targets: of molecule-level objectives; None unless the store was opened with them.
    """

    atom_features_N9: Tensor
    edge_index_2M: Tensor
    bond_features_M3: Tensor
    molecule_N: Tensor
    ptr_B: Tensor
    scaffold_mask_N: Tensor
    scaffold_key_B: Tensor
    generic_key_B: Tensor
    mol_key_B2: Tensor
    targets: MoleculeTargets | None = None

    @property
    def num_molecules(self) -> int:
        return self.scaffold_key_B.shape[0]

    @property
    def num_atoms(self) -> int:
        return self.molecule_N.shape[0]

    @property
    def num_bonds(self) -> int:
        return self.bond_features_M3.shape[0]

    def to(self, device: torch.device | str) -> MolBatch:
        """The same batch on `device`."""
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "targets"}
        targets = None if self.targets is None else MoleculeTargets(*(to_device(c, device) for c in self.targets))
        return MolBatch(**{name: to_device(column, device) for name, column in columns.items()}, targets=targets)

    def to_pyg(self) -> Batch:
        """The PyG batch of the same molecules, as `Batch.from_data_list` makes it from Open Graph Benchmark graphs."""
        edges = self.edge_index_2M
        edge_molecule = self.molecule_N[edges[0]]
        edge_counts = torch.bincount(edge_molecule, minlength=self.num_molecules).tolist()
        starts = self.ptr_B[:-1]
        local_edges = (edges - starts[edge_molecule]).split(edge_counts, dim=1)
        atoms = self.atom_features_N9.long().split(self.ptr_B.diff().tolist())
        bonds = self.bond_features_M3.long().repeat_interleave(2, dim=0).split(edge_counts)
        return Batch.from_data_list(
            [Data(x=x, edge_index=e, edge_attr=a) for x, e, a in zip(atoms, local_edges, bonds, strict=True)]
        )


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """`values` on `device`; to a GPU through pinned memory, from where the copy does not wait for the GPU."""
    if torch.device(device).type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def sum_by_molecule(x_N: Tensor, molecule_N: Tensor, num_molecules: int) -> Tensor:
    """Sum of what the atoms of each molecule have; [N, ...] -> [B, ...]"""
    return x_N.new_zeros(num_molecules, *x_N.shape[1:]).index_add(0, molecule_N, x_N)


def gather(store: MoleculeStore, rows: NDArray[np.int64]) -> MolBatch:
    """The molecules `rows` of `store`, in that order, as one batch.

    Raises:
        IndexError: a row outside the store.
    """
    parts = _by_shard(store, rows)
    atom_start, bond_start = np.zeros(len(rows) + 1, np.int64), np.zeros(len(rows) + 1, np.int64)
    for shard, row, place in parts:
        _count(row, place, shard.atom_offset, shard.bond_end_offset, atom_start, bond_start)
    np.cumsum(atom_start, out=atom_start)
    np.cumsum(bond_start, out=bond_start)
    atom_features = np.empty((atom_start[-1], 9), np.uint8)
    edge_index = np.empty((2, 2 * bond_start[-1]), np.int64)
    bond_features = np.empty((bond_start[-1], 3), np.uint8)
    molecule = np.empty(atom_start[-1], np.int64)
    scaffold_mask = np.empty(atom_start[-1], np.bool_)
    scaffold_key, generic_key = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
    mol_key = np.empty((len(rows), 2), np.uint64)
    for shard, row, place in parts:
        _copy_molecules(
            row, place, shard.atom_offset, shard.bond_end_offset, shard.atom_features_N9, shard.bond_index_M2,
            shard.bond_features_M3, shard.scaffold_mask_N, shard.scaffold_key, shard.generic_key, shard.mol_key_n2,
            atom_start, bond_start, atom_features, edge_index, bond_features, molecule, scaffold_mask, scaffold_key,
            generic_key, mol_key,
        )  # fmt: skip
    return MolBatch(
        atom_features_N9=torch.from_numpy(atom_features),
        edge_index_2M=torch.from_numpy(edge_index),
        bond_features_M3=torch.from_numpy(bond_features),
        molecule_N=torch.from_numpy(molecule),
        ptr_B=torch.from_numpy(atom_start),
        scaffold_mask_N=torch.from_numpy(scaffold_mask),
        scaffold_key_B=torch.from_numpy(scaffold_key.view(np.int64)),
        generic_key_B=torch.from_numpy(generic_key.view(np.int64)),
        mol_key_B2=torch.from_numpy(mol_key.view(np.int64)),
        targets=_gather_targets(parts, len(rows)) if store.with_targets else None,
    )


class _Part(NamedTuple):
    """Rows of one shard, and their places in the batch."""

    shard: Shard
    row: NDArray[np.int64]
    place: NDArray[np.int64]


def _by_shard(store: MoleculeStore, rows: NDArray[np.int64]) -> list[_Part]:
    shards, end_S, local, place = _group(rows, store.row_start)
    bounds = pairwise([0, *end_S.tolist()])
    return [
        _Part(store.shard(index), local[first:end], place[first:end])
        for index, (first, end) in zip(shards.tolist(), bounds, strict=True)
    ]


def bare_scaffolds(batch: MolBatch, chosen_B: Tensor) -> MolBatch:
    """The scaffold atoms of the molecules `chosen_B` (bool, B), and the bonds among them, as a batch.

    The features are those that the atoms have in their molecules: a cut side chain still counts in an atom's degree.
    """
    kept_N = batch.scaffold_mask_N & chosen_B[batch.molecule_N]
    kept_M = kept_N[batch.edge_index_2M[0, ::2]] & kept_N[batch.edge_index_2M[1, ::2]]
    place_N = kept_N.cumsum(0) - 1
    molecule_N = (chosen_B.cumsum(0) - 1)[batch.molecule_N[kept_N]]
    atoms_B = torch.bincount(molecule_N, minlength=int(chosen_B.sum()))
    return MolBatch(
        atom_features_N9=batch.atom_features_N9[kept_N],
        edge_index_2M=place_N[batch.edge_index_2M[:, kept_M.repeat_interleave(2)]],
        bond_features_M3=batch.bond_features_M3[kept_M],
        molecule_N=molecule_N,
        ptr_B=torch.cat([atoms_B.new_zeros(1), atoms_B.cumsum(0)]),
        scaffold_mask_N=batch.scaffold_mask_N[kept_N],
        scaffold_key_B=batch.scaffold_key_B[chosen_B],
        generic_key_B=batch.generic_key_B[chosen_B],
        mol_key_B2=batch.mol_key_B2[chosen_B],
    )


def _gather_targets(parts: list[_Part], molecules: int) -> MoleculeTargets:
    fingerprint = np.zeros((molecules, FINGERPRINT_BINS), np.uint8)
    descriptors = np.full((molecules, len(DESCRIPTORS)), np.nan, np.float32)
    for shard, row, place in parts:
        if shard.targets is not None:
            offset, bins, counts, values = shard.targets
            size = (offset[row + 1] - offset[row]).astype(np.int64)
            source = spans(offset[row].astype(np.int64), size)
            fingerprint[np.repeat(place, size), bins[source]] = counts[source]
            descriptors[place] = values[row]
    return MoleculeTargets(torch.from_numpy(fingerprint), torch.from_numpy(descriptors))


def scaffold_keys(store: MoleculeStore, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Scaffold and generic scaffold keys of `rows`, as the bits of uint64 in int64."""
    scaffold_key, generic_key = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
    for shard, row, place in _by_shard(store, rows):
        scaffold_key[place], generic_key[place] = shard.scaffold_key[row], shard.generic_key[row]
    return scaffold_key.view(np.int64), generic_key.view(np.int64)


@numba.njit(cache=True, nogil=True)
def _group(rows, row_start):  # type: ignore[no-untyped-def]
    """Rows by their shards: which S shards have some, the end of each one's; the rows inside them, and their places."""
    shard_of = np.empty(rows.size, np.int64)
    count = np.zeros(row_start.size - 1, np.int64)
    for i in range(rows.size):
        if not 0 <= rows[i] < row_start[-1]:
            raise IndexError("a row outside of the dataset")
        shard_of[i] = np.searchsorted(row_start, rows[i], side="right") - 1
        count[shard_of[i]] += 1
    end = np.cumsum(count) - count  # it moves to the end with each row
    local, place = np.empty(rows.size, np.int64), np.empty(rows.size, np.int64)
    for i in range(rows.size):
        shard = shard_of[i]
        local[end[shard]], place[end[shard]] = rows[i] - row_start[shard], i
        end[shard] += 1
    shards = np.flatnonzero(count)
    return shards, end[shards], local, place


@numba.njit(cache=True, nogil=True)
def _count(rows, place, atom_offset, bond_end_offset, atom_start, bond_start):  # type: ignore[no-untyped-def]
    """Atoms and bonds of molecules `rows` of one shard, each to the position after its `place`."""
    for r in range(rows.size):
        row, after = rows[r], place[r] + 1
        atom_start[after] = atom_offset[row + 1] - atom_offset[row]
        bond_start[after] = (bond_end_offset[row + 1] - bond_end_offset[row]) // 2


@numba.njit(cache=True, nogil=True)
def _copy(out, start, values, first, size):  # type: ignore[no-untyped-def]
    """`out[start:][:size] = values[first:][:size]`, which numba makes slower: it asks first whether the two overlap."""
    part, source = out[start : start + size], values[first : first + size]
    for i in range(size):
        part[i] = source[i]


# Molecules of a batch lie all over a shard, so each costs a dozen cache misses, half of the time of a copy. While one
# is copied, the one so many places behind it is on its way.
_AHEAD = 6
_LINE = 64


@numba.njit(cache=True, nogil=True)
def _copy_molecules(  # type: ignore[no-untyped-def]
    rows, place, atom_offset, bond_end_offset, atom_features, bond_ends, bond_features, scaffold_mask, scaffold_key,
    generic_key, mol_key, atom_start, bond_start, out_atom_features, out_edge_index, out_bond_features, out_molecule,
    out_scaffold_mask, out_scaffold_key, out_generic_key, out_mol_key,
):  # fmt: skip
    """Copy molecules `rows` of one shard to positions `place` of the batch."""
    atom_features, bond_ends = atom_features.reshape(-1), bond_ends.reshape(-1)
    bond_features, mol_key = bond_features.reshape(-1), mol_key.reshape(-1)
    out_atom_features, out_bond_features = out_atom_features.reshape(-1), out_bond_features.reshape(-1)
    first_atom, first_bond = np.empty(rows.size, np.int64), np.empty(rows.size, np.int64)
    for r in range(rows.size):
        first_atom[r], first_bond[r] = atom_offset[rows[r]], bond_end_offset[rows[r]] // 2
        prefetch(scaffold_key, rows[r])
        prefetch(generic_key, rows[r])
    for r in range(rows.size):
        if r + _AHEAD < rows.size:
            source = first_atom[r + _AHEAD]
            for line in range(4):
                prefetch(atom_features, 9 * source + line * _LINE)
            prefetch(scaffold_mask, source)
            source = first_bond[r + _AHEAD]
            for line in range(2):
                prefetch(bond_ends, 2 * source + line * _LINE // 2)
                prefetch(bond_features, 3 * source + line * _LINE)
            prefetch(mol_key, 2 * rows[r + _AHEAD])
        row, b = rows[r], place[r]
        first, end = atom_start[b], atom_start[b + 1]
        _copy(out_atom_features, 9 * first, atom_features, 9 * first_atom[r], 9 * (end - first))
        _copy(out_scaffold_mask, first, scaffold_mask, first_atom[r], end - first)
        out_molecule[first:end] = b
        bond, bond_end, source = bond_start[b], bond_start[b + 1], first_bond[r]
        _copy(out_bond_features, 3 * bond, bond_features, 3 * source, 3 * (bond_end - bond))
        ends = bond_ends[2 * source : 2 * (source + bond_end - bond)]
        begin_edges, end_edges = out_edge_index[0, 2 * bond : 2 * bond_end], out_edge_index[1, 2 * bond : 2 * bond_end]
        for j in range(0, ends.size, 2):
            u, v = first + ends[j], first + ends[j + 1]
            begin_edges[j], begin_edges[j + 1] = u, v
            end_edges[j], end_edges[j + 1] = v, u
        out_scaffold_key[b], out_generic_key[b] = scaffold_key[row], generic_key[row]
        out_mol_key[b, 0], out_mol_key[b, 1] = mol_key[2 * row], mol_key[2 * row + 1]
