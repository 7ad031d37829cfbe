"""Write: the runs of all partitions, in the order of their hashes -> the shards of a split."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.durable import atomically
from data_pipeline.execution.task import Task, work_file
from data_pipeline.execution.watch import Watch
from data_pipeline.keys import range_starts
from data_pipeline.manifest import FileRecord, ShardRecord
from data_pipeline.molecules.targets import with_targets
from data_pipeline.schema import MOLECULE_SCHEMA, shard_schema
from data_pipeline.stages.partitions import concatenate, mol_key_words, read_listing
from data_pipeline.stages.reduce_stage import REDUCED_SCHEMA, between, read_reduced
from data_pipeline.stages.statistics import DescriptorSums


@dataclass(frozen=True)
class WriteResult:
    """`shards` have the names that they have in the work folder; `descriptors`: sums over all of them."""

    shards: list[ShardRecord]
    descriptors: DescriptorSums


@dataclass(frozen=True)
class WriteTask(Task[WriteResult]):
    """Write `count` shards of a split, from `first` on: the runs whose hash lies in these of `shards` equal ranges.

    reduced: listing of the files that the reduce tasks wrote; targets: compute `schema.TARGET_FIELDS` as well; of a
    molecule that takes more CPU time than `molecule_seconds` they are left empty.
    """

    work: str
    reduced: str
    split: str
    first: int
    count: int
    shards: int
    targets: bool
    molecule_seconds: float

    def __str__(self) -> str:
        return f"{self.split} shards from {self.first}"

    @property
    def identity(self) -> tuple[object, ...]:
        targets = (self.targets, self.molecule_seconds)
        return (os.path.basename(self.reduced), self.split, self.first, self.count, self.shards, *targets)

    def outputs(self, result: WriteResult) -> list[str]:
        return [self._file(shard) for shard in self._numbers]

    def run(self, watch: Watch) -> WriteResult:
        """Write the shards."""
        watch.begin(self.molecule_seconds)
        bounds = [*range_starts(self.shards).tolist(), 1 << 64]
        low, high = bounds[self.first], bounds[self.first + self.count]
        pieces = [piece for path in read_listing(self.reduced) for piece in read_reduced(path, self.split, low, high)]
        result = WriteResult([], DescriptorSums())
        rows = 0
        for shard in self._numbers:
            molecules = concatenate([between(piece, *bounds[shard : shard + 2]) for piece in pieces], REDUCED_SCHEMA)
            molecules = _in_run_order(molecules)
            if self.targets:
                molecules = with_targets(molecules, watch, first_row=rows)
                result.descriptors.add(DescriptorSums.of(molecules))
            result.shards.append(self._write(shard, molecules))
            rows += molecules.num_rows
        return result

    @property
    def _numbers(self) -> range:
        return range(self.first, self.first + self.count)

    def _file(self, shard: int) -> str:
        return work_file(self.work, "shard", f"{self.key}-{shard}")

    def _write(self, shard: int, molecules: pa.RecordBatch) -> ShardRecord:
        """Write a shard: an Arrow stream of one record batch."""
        path = self._file(shard)
        with (
            atomically(path) as temporary,
            pa.OSFile(temporary, "wb") as sink,
            pa.ipc.new_stream(sink, shard_schema(self.targets)) as writer,
        ):
            writer.write_batch(molecules)
        record = FileRecord.of(Path(self.work), os.path.basename(path))
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


def shard_file(split: str, number: int) -> str:
    """A shard's file, relative to the dataset folder."""
    return f"{split}/data-{number:05d}.arrow"


def _in_run_order(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows by ascending (run_hash, scaffold_key, mol_key): the order does not depend on the partitions."""
    high, low = mol_key_words(rows.column("mol_key"))
    order = np.lexsort((low, high, rows.column("scaffold_key").to_numpy(), rows.column("run_hash").to_numpy()))
    return rows.select(MOLECULE_SCHEMA.names).take(pa.array(order))


def _total(molecules: pa.RecordBatch, column: str) -> int:
    return int(molecules.column(column).to_numpy().sum(dtype=np.int64))


def _largest(molecules: pa.RecordBatch, column: str) -> int:
    return int(molecules.column(column).to_numpy().max(initial=0))
