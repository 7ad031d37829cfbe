"""Write: the runs of all partitions, in the order of their hashes -> the shards of a split."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.keys import range_starts
from data_pipeline.manifest import FileRecord, ShardRecord
from data_pipeline.partitions import concatenate, mol_key_words, read_listing
from data_pipeline.reduce_stage import REDUCED_SCHEMA
from data_pipeline.schema import MOLECULE_SCHEMA, SPLITS
from data_pipeline.task import Task, atomically, work_file
from data_pipeline.watch import Watch


@dataclass(frozen=True)
class WriteTask(Task[ShardRecord]):
    """Write shard `shard` of `shards` of a split: the runs whose hash lies in that one of `shards` equal ranges.

    reduced: listing of the files that the reduce tasks wrote, with `buckets` buckets each. The result has the name that
    the shard has in the work folder.
    """

    work: str
    reduced: str
    buckets: int
    split: str
    shard: int
    shards: int

    def __str__(self) -> str:
        return f"{self.split} shard {self.shard}"

    @property
    def identity(self) -> tuple[object, ...]:
        return (os.path.basename(self.reduced), self.buckets, self.split, self.shard, self.shards)

    @property
    def file(self) -> str:
        """An Arrow stream of one record batch, with `MOLECULE_SCHEMA`."""
        return work_file(self.work, "shard", self.key)

    def outputs(self, result: ShardRecord) -> list[str]:
        return [self.file]

    def run(self, watch: Watch) -> ShardRecord:
        """Write the shard."""
        pieces = [piece for path in read_listing(self.reduced) for piece in self._pieces(path)]
        molecules = _in_run_order(concatenate(pieces, REDUCED_SCHEMA))
        with (
            atomically(self.file) as temporary,
            pa.OSFile(temporary, "wb") as sink,
            pa.ipc.new_stream(sink, MOLECULE_SCHEMA) as writer,
        ):
            writer.write_batch(molecules)
        record = FileRecord.of(Path(self.work), os.path.basename(self.file))
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

    def _pieces(self, path: str) -> list[pa.RecordBatch]:
        """The shard's rows in one reduced file."""
        first = SPLITS.index(self.split) * self.buckets
        low, high = [*range_starts(self.shards).tolist(), 1 << 64][self.shard : self.shard + 2]
        begin, end = low * self.buckets >> 64, ((high - 1) * self.buckets >> 64) + 1
        with pa.OSFile(path) as source:
            file = pa.ipc.open_file(source)
            batches = [file.get_batch(first + bucket) for bucket in range(begin, end)]
        return [_between(batch, low, high) for batch in batches if batch.num_rows]


def shard_file(split: str, number: int) -> str:
    """A shard's file, relative to the dataset folder."""
    return f"{split}/data-{number:05d}.arrow"


def _between(rows: pa.RecordBatch, low: int, high: int) -> pa.RecordBatch:
    """The rows, ascending by run_hash, whose run_hash is at least `low` and below `high`."""
    hashes = rows.column("run_hash").to_numpy()
    begin = int(np.searchsorted(hashes, np.uint64(low)))
    end = int(np.searchsorted(hashes, np.uint64(high - 1), side="right"))
    return rows.slice(begin, end - begin)


def _in_run_order(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows by ascending (run_hash, scaffold_key, mol_key): the order does not depend on the partitions."""
    high, low = mol_key_words(rows.column("mol_key"))
    order = np.lexsort((low, high, rows.column("scaffold_key").to_numpy(), rows.column("run_hash").to_numpy()))
    return rows.select(MOLECULE_SCHEMA.names).take(pa.array(order))


def _total(molecules: pa.RecordBatch, column: str) -> int:
    return int(molecules.column(column).to_numpy().sum(dtype=np.int64))


def _largest(molecules: pa.RecordBatch, column: str) -> int:
    return int(molecules.column(column).to_numpy().max(initial=0))
