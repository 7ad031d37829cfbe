"""Mapped shards of a prepared dataset as NumPy views: nothing is read before it is used, nothing is copied."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.errors import PipelineError
from data_pipeline.manifest import Manifest, ShardRecord, file_path
from data_pipeline.remote import join_url
from data_pipeline.schema import ATOM_FEATURE_SIZES, BOND_FEATURE_SIZES, DESCRIPTORS
from hmoe_ds.data.cache import ShardCache
from hmoe_ds.data.shard_file import check_shard_schema, read_shard


class ShardTargets(NamedTuple):
    """What molecule-level objectives predict of the n molecules of a shard.

    Offsets have length n + 1: the fingerprint of molecule i is rows `fingerprint_offset[i]` to
    `fingerprint_offset[i + 1]` of bins and counts; none = not known. A descriptor that is not known is NaN.
    """

    fingerprint_offset: NDArray[np.int32]
    fingerprint_bins: NDArray[np.uint16]
    fingerprint_counts: NDArray[np.uint8]
    descriptors_nT: NDArray[np.float32]


class Shard(NamedTuple):
    """The columns of one shard; n molecules, N atoms, M bonds.

    Offsets have length n + 1: atom j of molecule i is row `atom_offset[i] + j`; bond j is row
    `bond_end_offset[i] / 2 + j`, as its offsets count bond ends. `targets` are there when they were asked for.
    """

    num_atoms: NDArray[np.uint16]
    num_bonds: NDArray[np.uint16]
    atom_offset: NDArray[np.int32]
    bond_end_offset: NDArray[np.int32]
    atom_features_N9: NDArray[np.uint8]
    bond_index_M2: NDArray[np.uint16]
    bond_features_M3: NDArray[np.uint8]
    scaffold_mask_N: NDArray[np.uint8]
    scaffold_key: NDArray[np.uint64]
    generic_key: NDArray[np.uint64]
    mol_key_n2: NDArray[np.uint64]
    complexity: NDArray[np.float32]
    targets: ShardTargets | None = None

    @property
    def rows(self) -> int:
        return len(self.num_atoms)


# How many shards of each split of a dataset belong to a run: shards that are appended later do not.
Extent = Mapping[str, int]


class ShardStore:
    """One split of a dataset directory, addressed by row: the shards' rows one after the other.

    Args:
        path: dataset directory, or its URL.
        split: `train` or `validation`.
        extent: only the first shards of each split; without it all of them.
        cache: where the shards of a URL are kept; a directory needs none.
        targets: view the columns of molecule-level objectives too; the dataset must have them (`has_targets`).
        verify: compare the checksum of a shard with the manifest before its first use. A cache always does.

    Attributes:
        row_start: first row of each shard, then the number of rows.

    Raises:
        PipelineError: no dataset there, or one of another format version.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        extent: Extent | None = None,
        cache: ShardCache | None = None,
        targets: bool = False,
        verify: bool = True,
    ) -> None:
        self.path, self.manifest = str(path), Manifest.load(path)
        self._shards_of = {
            name: record.shards[: extent[name] if extent else None] for name, record in self.manifest.splits.items()
        }
        self._records = self._shards_of[split]
        self._split = split
        self._cache, self.with_targets = cache, targets
        self.row_start = np.concatenate([[0], np.cumsum([record.rows for record in self._records])]).astype(np.int64)
        self._open: dict[int, Shard] = {}
        self._unverified = {record.file for record in self._records} if verify else set()

    def __len__(self) -> int:
        return int(self.row_start[-1])

    @property
    def num_shards(self) -> int:
        return len(self._records)

    @property
    def has_targets(self) -> bool:
        """Whether the dataset has the columns of molecule-level objectives; `with_targets`: whether they are viewed."""
        return bool(self.manifest.options["targets"])

    def shard(self, index: int) -> Shard:
        """Views into shard `index`, mapped at the first use.

        Raises:
            PipelineError: the file is gone, or is not what was written.
        """
        if index not in self._open:
            record = self._records[index]
            with self._map(record) as file:
                batch = read_shard(file, self._name(record), record, self.has_targets)
                self._open[index] = shard_from_batch(batch, self.with_targets)
        return self._open[index]

    def window(self, current: Collection[int], upcoming: Collection[int] = ()) -> None:
        """Say which shards are used from now on, and which will be next: they are fetched ahead, others let go."""
        self._open = {index: shard for index, shard in self._open.items() if index in current}
        if self._cache is not None:
            self._cache.window([self._records[i] for i in current], [self._records[i] for i in upcoming])

    def check_files(self) -> None:
        """Raise PipelineError when a shard is missing or has another size than it was written with.

        Of a dataset in a directory also UsageError when a shard has other columns than the manifest says; one behind a
        URL shows that when it has been downloaded.
        """
        if self._cache is not None:
            self._cache.check(self._records)
            return
        for record in self._records:
            file = file_path(self.path, record)
            size = file.stat().st_size if file.is_file() else None
            if size != record.bytes:
                found = "is missing" if size is None else f"has {size} bytes, expected {record.bytes}"
                raise PipelineError(f"{file} {found}: copy the dataset again, or run `hmoe prepare` again")
            with self._map(record) as mapped:
                check_shard_schema(mapped, str(file), self.has_targets)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of all splits; two directories with the same molecules agree."""
        digest = hashlib.blake2b(digest_size=16)
        for name, records in self._shards_of.items():
            for record in records:
                digest.update(f"{name} {record.blake2b}\n".encode())
        return digest.hexdigest()

    def first_shards(self, molecules: int) -> list[int]:
        """The shards that hold the first `molecules` molecules; there must be so many."""
        return list(range(int(np.searchsorted(self.row_start, molecules))))

    def shards_of_a_step(self, molecules: int, window_shards: int) -> list[int]:
        """As many of the largest shards as a plan may look at in a step of `molecules` molecules, or more."""
        rows = min((record.rows for record in self._records if record.rows), default=1)
        windows = 1 + -(-molecules // (rows * window_shards))
        by_size = sorted(range(self.num_shards), key=lambda index: -self._records[index].bytes)
        return by_size[: windows * window_shards]

    def cached_bytes_of(self, shards: Collection[int]) -> int:
        """Bytes of these shards in the cache; none where there is no cache."""
        return sum(self._records[index].bytes for index in shards) if self._cache is not None else 0

    def _name(self, record: ShardRecord) -> str:
        return join_url(self.path, record.file) if self._cache is not None else str(Path(self.path) / record.file)

    def _map(self, record: ShardRecord) -> pa.MemoryMappedFile:
        if self._cache is not None:
            return self._cache.open(record)
        file = file_path(self.path, record)
        try:
            mapped = pa.memory_map(str(file))
            if record.file in self._unverified:
                self._verify(mapped, record)
        except OSError as error:
            raise PipelineError(f"{file} cannot be read ({error}): copy the dataset again") from error
        return mapped

    def _verify(self, mapped: pa.MemoryMappedFile, record: ShardRecord) -> None:
        """Compare the content with the manifest, once: what is wrong in it would be trained on, or end the process."""
        checksum = hashlib.blake2b(mapped.read_buffer(), digest_size=16).hexdigest()
        mapped.seek(0)
        if checksum != record.blake2b:
            raise PipelineError(
                f"{file_path(self.path, record)} is not what was written (checksum differs): copy the dataset again; "
                "`hmoe inspect --verify` tells which files are damaged"
            )
        self._unverified.remove(record.file)

    @property
    def extent(self) -> dict[str, int]:
        """Shards of each split that belong to this store's dataset."""
        return {name: len(records) for name, records in self._shards_of.items()}

    @property
    def complexity_percentiles(self) -> list[float]:
        """Percentiles 0, 1, ..., 100 of complexity in the split, with what was appended since its `extent`."""
        return self.manifest.splits[self._split].complexity_percentiles

    @property
    def max_atoms(self) -> int:
        """Atoms of the largest molecule."""
        return max((record.max_atoms for record in self._records), default=0)

    @property
    def max_bonds(self) -> int:
        """Bonds of the molecule with most of them."""
        return max((record.max_bonds for record in self._records), default=0)


class BatchStore:
    """A record batch in memory behind the interface of `ShardStore`: molecules that were just featurised."""

    num_shards = 1
    with_targets = False

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._shard = shard_from_batch(batch)
        self.row_start = np.array([0, self._shard.rows])

    def __len__(self) -> int:
        return self._shard.rows

    def shard(self, index: int) -> Shard:
        return self._shard


def shard_from_batch(batch: pa.RecordBatch, targets: bool = False) -> Shard:
    """View a record batch with a schema that `data_pipeline.schema.shard_schema` gives as NumPy arrays, without a copy.

    Args:
        batch: the molecules.
        targets: view the columns of molecule-level objectives too.
    """
    return Shard(
        num_atoms=_flat_column(batch, "num_atoms"),
        num_bonds=_flat_column(batch, "num_bonds"),
        # The mask has one value per atom and the bond index two per bond, so their offsets are those of the rows.
        atom_offset=_flat(batch.column("scaffold_mask").offsets),
        bond_end_offset=_flat(batch.column("bond_index").offsets),
        atom_features_N9=_list_values(batch, "atom_features").reshape(-1, len(ATOM_FEATURE_SIZES)),
        bond_index_M2=_list_values(batch, "bond_index").reshape(-1, 2),
        bond_features_M3=_list_values(batch, "bond_features").reshape(-1, len(BOND_FEATURE_SIZES)),
        scaffold_mask_N=_list_values(batch, "scaffold_mask"),
        scaffold_key=_flat_column(batch, "scaffold_key"),
        generic_key=_flat_column(batch, "generic_key"),
        mol_key_n2=_key_column(batch, "mol_key"),
        complexity=_flat_column(batch, "complexity"),
        targets=_targets_from_batch(batch) if targets else None,
    )


def _targets_from_batch(batch: pa.RecordBatch) -> ShardTargets:
    return ShardTargets(
        fingerprint_offset=_flat(batch.column("fingerprint_bins").offsets),
        fingerprint_bins=_list_values(batch, "fingerprint_bins"),
        fingerprint_counts=_list_values(batch, "fingerprint_counts"),
        descriptors_nT=_list_values(batch, "descriptors").reshape(-1, len(DESCRIPTORS)),
    )


def _flat(array: pa.Array) -> NDArray[Any]:
    return array.to_numpy(zero_copy_only=True)


def _flat_column(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    return _flat(batch.column(name))


def _list_values(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    """All values behind a list column, which its offsets count from the first."""
    return _flat(batch.column(name).values)


def _key_column(batch: pa.RecordBatch, name: str) -> NDArray[np.uint64]:
    # NumPy's bytes type strips trailing NULs, so the buffer is read as integers.
    column = batch.column(name)
    words = np.frombuffer(column.buffers()[1], np.uint64)
    return words.reshape(-1, 2)[column.offset : column.offset + len(column)]
