"""The files between map and reduce: molecules, cut into partitions by ranges of their keys.

A partition holds every molecule of its scaffolds, so the same molecule always meets itself there. An acyclic molecule
has no scaffold and goes by its own key.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipeline.durable import atomically
from data_pipeline.execution.task import digest, work_file
from data_pipeline.keys import range_of
from data_pipeline.molecules.scaffold import ACYCLIC_KEY
from data_pipeline.schema import MOLECULE_SCHEMA

# A molecule and its scaffold. The order of the rows, over all files, is the order of reading.
MAPPED_SCHEMA = MOLECULE_SCHEMA.append(pa.field("scaffold_smiles", pa.string()))

_BATCH_ROWS = 512

_COMPRESSED = pa.ipc.IpcWriteOptions(compression="lz4")


def partition_of(rows: pa.RecordBatch, partitions: int) -> np.ndarray:
    """The partition of each row, by its two keys: int64 [n]."""
    scaffold_keys = rows.column("scaffold_key").to_numpy()
    own_keys, _ = mol_key_words(rows.column("mol_key"))
    return range_of(np.where(scaffold_keys == ACYCLIC_KEY, own_keys, scaffold_keys), partitions)


def write_partitions(path: str, rows: pa.RecordBatch, partition: np.ndarray, partitions: int) -> None:
    """Write `rows`, each of the partition `partition` [n] says, as an Arrow file of a few partitions a record batch."""
    batches = batches_for(rows.num_rows, partitions)
    ordered = rows.take(pa.array(np.argsort(partition, kind="stable")))
    write_batches(path, rows.schema, cut(ordered, np.bincount(partition * batches // partitions, minlength=batches)))


def read_partition(paths: Iterable[str], index: int, partitions: int) -> Iterator[pa.RecordBatch]:
    """The rows of one of `partitions` partitions, a batch of each file that `write_partitions` wrote."""
    for path in paths:
        with pa.OSFile(path) as source:
            file = pa.ipc.open_file(source)
            batch = file.get_batch(index * file.num_record_batches // partitions)
            has_others = file.num_record_batches < partitions
        yield batch.take(pa.array(np.flatnonzero(partition_of(batch, partitions) == index))) if has_others else batch


def batches_for(rows: int, ranges: int) -> int:
    """In how many record batches, a power of two, rows of `ranges` ranges of keys, a power of two, are written.

    A record batch takes some kilobytes beside its rows, and reading rows that are not wanted costs little: so a batch
    has some hundred rows at least.
    """
    return min(ranges, 1 << max(rows // _BATCH_ROWS, 1).bit_length() - 1)


def cut(rows: pa.RecordBatch, lengths: np.ndarray) -> Iterator[pa.RecordBatch]:
    """Consecutive pieces of `rows`, of these lengths."""
    ends = np.cumsum(lengths).tolist()
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        yield rows.slice(start, end - start)


def write_batches(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write an Arrow file, compressed, which is there as a whole or not at all."""
    with (
        atomically(path) as temporary,
        pa.OSFile(temporary, "wb") as sink,
        pa.ipc.new_file(sink, schema, options=_COMPRESSED) as writer,
    ):
        for batch in batches:
            writer.write_batch(batch)


def read_batch(path: str, index: int) -> pa.RecordBatch:
    """One record batch of an Arrow file; the others are not read."""
    with pa.OSFile(path) as source:
        return pa.ipc.open_file(source).get_batch(index)


def concatenate(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """One record batch from several, or from none."""
    table = pa.Table.from_batches(batches, schema)
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=schema)


def mol_key_words(keys: pa.FixedSizeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of 128-bit keys as uint64 [n] each; ordered like the keys' bytes."""
    words = np.frombuffer(keys.buffers()[1], dtype=">u8").reshape(-1, 2)[keys.offset : keys.offset + len(keys)]
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)


@dataclass(frozen=True)
class Inputs:
    """Listings of the files that hold all partitions: of new molecules, of keys of the dataset that is appended to, and
    of molecules to leave out."""

    mapped: str
    known: str
    excluded: str

    @property
    def identity(self) -> tuple[str, ...]:
        """Names that follow from the files' names."""
        return tuple(map(os.path.basename, (self.mapped, self.known, self.excluded)))


def write_listing(work: str, paths: Sequence[str]) -> str:
    """Write a list of files of the work folder, which many tasks read. Returns its path, named by the list."""
    names = [os.path.basename(path) for path in paths]
    listing = work_file(work, "listing", digest(*names))
    with atomically(listing) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        handle.writelines(name + "\n" for name in names)
    return listing


def read_listing(listing: str) -> list[str]:
    """The files of a list that `write_listing` wrote."""
    with open(listing, encoding="utf-8") as handle:
        return [os.path.join(os.path.dirname(listing), name) for name in handle.read().splitlines()]
