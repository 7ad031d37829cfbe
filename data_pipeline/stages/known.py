"""What a dataset already holds, when more is appended to it: its keys by partition, its scaffolds, its statistics.

The keys may be many more than the new molecules, so they are looked through, never held.

All of it is read from the shards, which an append never touches. Of `scaffolds.parquet` only SMILES are taken, whose
keys are their hashes: a killed append may have left the counts of either state there.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import PipelineError
from data_pipeline.execution.task import Task, work_file
from data_pipeline.execution.watch import Watch
from data_pipeline.keys import file_checksum, is_first
from data_pipeline.molecules.scaffold import ACYCLIC_KEY
from data_pipeline.schema import MOLECULE_SCHEMA, SCAFFOLD_SCHEMA
from data_pipeline.stages.partitions import concatenate, partition_of, write_partitions
from data_pipeline.stages.statistics import SplitStatistics

KNOWN_SCHEMA = pa.schema([MOLECULE_SCHEMA.field(name) for name in ("mol_key", "scaffold_key")])

# Keys that are looked up at a time: a table is made of them, in which each new molecule is sought.
_KEYS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class IndexTask(Task[SplitStatistics]):
    """Write the keys of the shard `path`, whose checksum is `blake2b`, by partition. The result: its statistics."""

    work: str
    path: str
    blake2b: str
    partitions: int

    def __str__(self) -> str:
        return self.path

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.blake2b, self.partitions)

    @property
    def known_file(self) -> str:
        """The keys of the shard, with `KNOWN_SCHEMA` (`write_partitions`)."""
        return work_file(self.work, "known", self.key)

    def outputs(self, result: SplitStatistics) -> list[str]:
        return [self.known_file]

    def run(self, watch: Watch) -> SplitStatistics:
        """Index the shard.

        Raises:
            PipelineError: its content is not what was written.
        """
        if file_checksum(self.path) != self.blake2b:
            raise PipelineError(f"{self.path}: the content is not what was written (checksum differs); copy it again")
        with pa.memory_map(self.path) as source:
            batch = pa.ipc.open_stream(source).read_next_batch()
            partition = partition_of(batch, self.partitions)
            write_partitions(self.known_file, batch.select(KNOWN_SCHEMA.names), partition, self.partitions)
            return SplitStatistics.of(batch)


@dataclass(frozen=True)
class Known:
    """What is known of some new molecules: `found`, bool [n], is True where one is among the known ones; scaffolds of
    all known ones, but for the acyclic, ascending by key, and how many have each."""

    found: np.ndarray
    scaffold_keys: np.ndarray
    scaffold_counts: np.ndarray

    @classmethod
    def look_up(cls, mol_keys: pa.FixedSizeBinaryArray, known: Iterable[pa.RecordBatch]) -> "Known":
        """Look through known molecules, with `KNOWN_SCHEMA`, for those with `mol_keys` [n]."""
        found = np.zeros(len(mol_keys), dtype=bool)
        keys, counts = np.empty(0, np.uint64), np.empty(0, np.int64)
        for batch in _large(known):
            found |= pc.is_in(mol_keys, value_set=batch.column("mol_key")).to_numpy(zero_copy_only=False)
            scaffolds = batch.column("scaffold_key").to_numpy()
            both = np.concatenate([keys, scaffolds[scaffolds != ACYCLIC_KEY]])
            ones = np.ones(len(both) - len(keys), np.int64)
            keys, place = np.unique(both, return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, ones]), len(keys)).astype(np.int64)
        return cls(found, keys, counts)


def _large(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
    """The same rows in fewer batches."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += batch.num_rows
        if rows >= _KEYS_AT_A_TIME:
            yield concatenate(held, KNOWN_SCHEMA)
            held, rows = [], 0
    yield concatenate(held, KNOWN_SCHEMA)


def known_scaffolds(path: str | None, keys: np.ndarray, counts: np.ndarray) -> pa.RecordBatch:
    """Scaffolds with `keys` [n], ascending, and `counts` [n]; their SMILES from the Parquet file `path`.

    Raises:
        PipelineError: the file lacks one of them.
    """
    if path is None or not len(keys):
        return concatenate([], SCAFFOLD_SCHEMA)
    # The file is sorted by key, so this reads the row groups of the partition only.
    first, last = (pa.scalar(keys[at], pa.uint64()) for at in (0, -1))
    in_range = [("scaffold_key", ">=", first), ("scaffold_key", "<=", last)]
    table = pq.read_table(path, filters=in_range).cast(SCAFFOLD_SCHEMA)
    table = table.filter(pa.array(np.isin(table.column("scaffold_key").to_numpy(), keys)))
    if not np.array_equal(table.column("scaffold_key").to_numpy(), keys):
        raise PipelineError(f"{path}: does not list the scaffolds of the dataset's molecules; run `hmoe prepare` again")
    table = table.set_column(table.schema.names.index("count"), SCAFFOLD_SCHEMA.field("count"), pa.array(counts))
    return concatenate(table.to_batches(), SCAFFOLD_SCHEMA)


def merge_scaffolds(known: pa.RecordBatch, new: pa.RecordBatch) -> pa.RecordBatch:
    """Scaffolds of both, ascending by key, with the sum of their counts.

    Raises:
        PipelineError: two scaffolds have the same key.
    """
    both = concatenate([known, new], SCAFFOLD_SCHEMA)
    both = both.take(pa.array(np.argsort(both.column("scaffold_key").to_numpy(), kind="stable")))
    keys = both.column("scaffold_key").to_numpy()
    check_one_smiles_per_key(keys, both.column("smiles"))
    starts = np.flatnonzero(is_first(keys))
    counts = both.column("count").to_numpy()
    sums = np.add.reduceat(counts, starts) if len(starts) else counts
    merged = both.take(pa.array(starts))
    columns = [merged.column(name) for name in SCAFFOLD_SCHEMA.names[:-1]]
    return pa.RecordBatch.from_arrays([*columns, pa.array(sums)], schema=SCAFFOLD_SCHEMA)


def check_one_smiles_per_key(keys: np.ndarray, smiles: pa.StringArray) -> None:
    """Raise PipelineError if two scaffolds have the same key. `keys` ascending, with the SMILES of each."""
    codes = smiles.dictionary_encode().indices.to_numpy()
    clash = is_first(codes) & ~is_first(keys)
    if clash.any():
        at = int(np.flatnonzero(clash)[0])
        raise PipelineError(
            f"scaffolds {smiles[at - 1]} and {smiles[at]} have the same 64-bit key {keys[at]}; "
            "leave the molecules of one of them out"
        )
