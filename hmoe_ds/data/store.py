"""Mapped shards of a prepared dataset as NumPy views: nothing is read before it is used, nothing is copied."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.manifest import Manifest
from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES


class Shard(NamedTuple):
    """The columns of one shard; n molecules, N atoms, M bonds.

    Offsets are in atoms and bonds (length n + 1), so atom row `atom_offset[i] + j` is atom j of molecule i.
    """

    num_atoms: NDArray[np.uint16]
    num_bonds: NDArray[np.uint16]
    atom_offset: NDArray[np.int64]
    bond_offset: NDArray[np.int64]
    atom_features_N9: NDArray[np.uint8]
    bond_index_M2: NDArray[np.uint16]
    bond_features_M3: NDArray[np.uint8]
    scaffold_mask_N: NDArray[np.uint8]
    scaffold_key: NDArray[np.uint64]
    generic_key: NDArray[np.uint64]
    mol_key_n2: NDArray[np.uint64]

    @property
    def rows(self) -> int:
        return len(self.num_atoms)


class ShardStore:
    """One split of a dataset directory, addressed by row: the shards' rows one after the other.

    Args:
        path: dataset directory.
        split: `train` or `validation`.

    Raises:
        PipelineError: no dataset there, or one of another format version.
    """

    def __init__(self, path: str | Path, split: str) -> None:
        self.manifest = Manifest.load(path)
        self.statistics = self.manifest.splits[split]
        entries = self.statistics.shards
        self._files = [Path(path) / entry.file for entry in entries]
        self.row_start = np.concatenate([[0], np.cumsum([entry.rows for entry in entries])]).astype(np.int64)
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return int(self.row_start[-1])

    @property
    def num_shards(self) -> int:
        return len(self._files)

    def shard(self, index: int) -> Shard:
        """Views into shard `index`, mapped at the first use."""
        if index not in self._open:
            with pa.memory_map(str(self._files[index])) as file:
                self._open[index] = shard_from_batch(pa.ipc.open_stream(file).read_next_batch())
        return self._open[index]

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard index and row inside the shard of each global row."""
        shard = np.searchsorted(self.row_start, rows, side="right") - 1
        return shard, rows - self.row_start[shard]

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of all splits; two directories with the same molecules agree."""
        digest = hashlib.blake2b(digest_size=16)
        for name, split in self.manifest.splits.items():
            for shard in split.shards:
                digest.update(f"{name} {shard.blake2b}\n".encode())
        return digest.hexdigest()


class BatchStore:
    """A record batch in memory behind the interface of `ShardStore`: molecules that were just featurised."""

    num_shards = 1

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._shard = shard_from_batch(batch)

    def __len__(self) -> int:
        return self._shard.rows

    def shard(self, index: int) -> Shard:
        return self._shard

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros_like(rows), rows


def shard_from_batch(batch: pa.RecordBatch) -> Shard:
    """View a record batch with `data_pipeline.schema.MOLECULE_SCHEMA` as NumPy arrays, without a copy."""
    atom_values, atom_offset = _list_column(batch, "atom_features", len(ATOM_FEATURE_SIZES))
    bond_values, bond_offset = _list_column(batch, "bond_features", len(BOND_FEATURE_SIZES))
    return Shard(
        num_atoms=_flat_column(batch, "num_atoms"),
        num_bonds=_flat_column(batch, "num_bonds"),
        atom_offset=atom_offset,
        bond_offset=bond_offset,
        atom_features_N9=atom_values,
        bond_index_M2=_list_column(batch, "bond_index", 2)[0],
        bond_features_M3=bond_values,
        scaffold_mask_N=_list_column(batch, "scaffold_mask", 1)[0][:, 0],
        scaffold_key=_flat_column(batch, "scaffold_key"),
        generic_key=_flat_column(batch, "generic_key"),
        mol_key_n2=_key_column(batch, "mol_key"),
    )


def _flat_column(batch: pa.RecordBatch, name: str) -> NDArray:
    return batch.column(name).to_numpy(zero_copy_only=True)


def _list_column(batch: pa.RecordBatch, name: str, width: int) -> tuple[NDArray, NDArray[np.int64]]:
    """Values as [rows, width] and offsets in rows, both starting at the batch's first molecule."""
    column = batch.column(name)
    offset = column.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
    values = column.values.to_numpy(zero_copy_only=True)[offset[0] : offset[-1]]
    return values.reshape(-1, width), (offset - offset[0]) // width


def _key_column(batch: pa.RecordBatch, name: str) -> NDArray[np.uint64]:
    # NumPy's bytes type strips trailing NULs, so the buffer is read as integers.
    column = batch.column(name)
    words = np.frombuffer(column.buffers()[1], np.uint64)
    return words.reshape(-1, 2)[column.offset : column.offset + len(column)]
