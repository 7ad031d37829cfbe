"""Write: the runs of all partitions, in the order of their hashes -> the shards of a split."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.keys import range_starts
from data_pipeline.manifest import FileRecord, ShardRecord
from data_pipeline.partitions import concatenate, mol_key_words
from data_pipeline.reduce_stage import REDUCED_SCHEMA, reduced_file
from data_pipeline.schema import MOLECULE_SCHEMA, SPLITS


@dataclass(frozen=True)
class WriteTask:
    """Write shard `shard` of `shards` of a split: the runs whose hash lies in that one of `shards` equal ranges.

    `first`: the number in the file name of shard 0; an append goes on after the shards that are there.
    """

    work: str
    partitions: int
    dataset: str
    split: str
    shard: int
    shards: int
    first: int

    def __str__(self) -> str:
        return f"{self.split} shard {self.shard}"

    @property
    def file(self) -> str:
        """The shard's file, relative to the dataset folder."""
        return shard_file(self.split, self.first + self.shard)


def shard_file(split: str, number: int) -> str:
    """A shard's file, relative to the dataset folder."""
    return f"{split}/data-{number:05d}.arrow"


def run_write(task: WriteTask) -> ShardRecord:
    """Do a write task: an Arrow stream of one record batch. The same task always writes the same bytes."""
    pieces = [_shard_rows(task, reduced_file(task.work, index)) for index in range(task.partitions)]
    molecules = _in_run_order(concatenate(pieces, REDUCED_SCHEMA))
    dataset = Path(task.dataset)
    with pa.OSFile(str(dataset / task.file), "wb") as sink, pa.ipc.new_stream(sink, MOLECULE_SCHEMA) as writer:
        writer.write_batch(molecules)
    record = FileRecord.of(dataset, task.file)
    return ShardRecord(
        record.file,
        record.bytes,
        record.blake2b,
        rows=molecules.num_rows,
        atoms=_total(molecules, "num_atoms"),
        bonds=_total(molecules, "num_bonds"),
        max_atoms=_largest(molecules, "num_atoms"),
        max_bonds=_largest(molecules, "num_bonds"),
    )


def _shard_rows(task: WriteTask, path: str) -> pa.RecordBatch:
    """The shard's rows of one partition, copied out of the mapped file."""
    with pa.memory_map(path) as source:
        batch = pa.ipc.open_file(source).get_batch(SPLITS.index(task.split))
        bounds = np.searchsorted(batch.column("run_hash").to_numpy(), range_starts(task.shards))
        begin, end = [*bounds.tolist(), batch.num_rows][task.shard : task.shard + 2]
        return batch.take(pa.array(np.arange(begin, end)))


def _in_run_order(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows by ascending (run_hash, scaffold_key, mol_key): the order does not depend on the partitions."""
    high, low = mol_key_words(rows.column("mol_key"))
    order = np.lexsort((low, high, rows.column("scaffold_key").to_numpy(), rows.column("run_hash").to_numpy()))
    return rows.select(MOLECULE_SCHEMA.names).take(pa.array(order))


def _total(molecules: pa.RecordBatch, column: str) -> int:
    return int(molecules.column(column).to_numpy().sum(dtype=np.int64))


def _largest(molecules: pa.RecordBatch, column: str) -> int:
    return int(molecules.column(column).to_numpy().max(initial=0))
