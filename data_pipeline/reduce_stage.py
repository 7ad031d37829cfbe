"""Reduce: one partition of the mapped molecules -> without duplicates, cut into runs, ready to be dealt to shards.

A run is up to `RUN_LENGTH` molecules of one scaffold, by ascending mol_key; an acyclic molecule is a run of its own.
Runs are ordered by a hash, so that a shard is a fair sample of the whole, while the molecules of a run stay together.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.keys import digest64, is_first
from data_pipeline.known import check_one_smiles_per_key, known_scaffolds, merge_scaffolds, read_known
from data_pipeline.partitions import MAPPED_SCHEMA, mapped_file, mol_key_words, read_partition
from data_pipeline.scaffold import ACYCLIC_KEY
from data_pipeline.schema import MOLECULE_SCHEMA, SCAFFOLD_SCHEMA, SPLITS
from data_pipeline.statistics import SplitStatistics

RUN_LENGTH = 16

# A molecule, and the hash of its run.
REDUCED_SCHEMA = MOLECULE_SCHEMA.append(pa.field("run_hash", pa.uint64()))


@dataclass(frozen=True)
class ReduceTask:
    """Reduce one partition of the files that `map_tasks` map tasks left in the folder `work`.

    `known_shards`: how many shards the dataset that is appended to has; their keys lie in `work` too.
    `known_scaffolds`: its scaffolds.parquet.
    """

    work: str
    partition: int
    map_tasks: int
    validation_fraction: float
    known_shards: int = 0
    known_scaffolds: str | None = None

    def __str__(self) -> str:
        return f"partition {self.partition}"


@dataclass(frozen=True)
class ReduceResult:
    """By split: `statistics` of the new molecules, number of `scaffolds` of these and the known ones together."""

    duplicates: int
    statistics: dict[str, SplitStatistics]
    scaffolds: dict[str, int]


def reduced_file(work: str, partition: int) -> str:
    """The molecules of a partition: one record batch per split, with `REDUCED_SCHEMA`, ascending by run_hash."""
    return str(Path(work) / f"reduced-{partition:05d}.arrow")


def scaffolds_file(work: str, partition: int) -> str:
    """The scaffolds of a partition, those of known molecules among them: one record batch, ascending by key."""
    return str(Path(work) / f"scaffolds-{partition:05d}.arrow")


def run_reduce(task: ReduceTask) -> ReduceResult:
    """Do a reduce task. The same task always writes the same bytes.

    Raises:
        PipelineError: two scaffolds have the same key.
    """
    paths = [mapped_file(task.work, index) for index in range(task.map_tasks)]
    mapped = read_partition(paths, task.partition, MAPPED_SCHEMA)
    known = read_known(task.work, task.known_shards, task.partition)
    rows = _Rows.distinct(_without(known, mapped))
    scaffolds = merge_scaffolds(known_scaffolds(task.known_scaffolds, known), _scaffolds(rows))
    _write_file(scaffolds_file(task.work, task.partition), SCAFFOLD_SCHEMA, [scaffolds])

    run_hash = _run_hashes(rows)
    in_validation = _in_validation(rows.scaffold_key, task.validation_fraction)
    batches = [_ordered_by_run(rows, run_hash, chosen) for chosen in (~in_validation, in_validation)]
    _write_file(reduced_file(task.work, task.partition), REDUCED_SCHEMA, batches)
    statistics = {split: SplitStatistics.of(batch) for split, batch in zip(SPLITS, batches, strict=True)}
    held_out = int(_in_validation(scaffolds.column("scaffold_key").to_numpy(), task.validation_fraction).sum())
    by_split = dict(zip(SPLITS, (scaffolds.num_rows - held_out, held_out), strict=True))
    return ReduceResult(mapped.num_rows - len(rows.index), statistics, by_split)


def _without(known: pa.RecordBatch, mapped: pa.RecordBatch) -> pa.RecordBatch:
    """The mapped molecules that are not among the known ones."""
    if not known.num_rows:
        return mapped
    return mapped.filter(pc.invert(pc.is_in(mapped.column("mol_key"), value_set=known.column("mol_key"))))


@dataclass(frozen=True)
class _Rows:
    """Distinct molecules by ascending (scaffold_key, mol_key): `index` [n] into `mapped`, and their keys [n]."""

    mapped: pa.RecordBatch
    index: np.ndarray
    scaffold_key: np.ndarray
    mol_key_high: np.ndarray
    mol_key_low: np.ndarray

    @classmethod
    def distinct(cls, mapped: pa.RecordBatch) -> "_Rows":
        """Of the rows with the same mol_key, the one read first."""
        scaffold_key, source_index, row = (
            mapped.column(name).to_numpy() for name in ("scaffold_key", "source_index", "row")
        )
        high, low = mol_key_words(mapped.column("mol_key"))
        order = np.lexsort((row, source_index, low, high, scaffold_key))
        index = order[is_first(high[order], low[order])]
        return cls(mapped, index, scaffold_key[index], high[index], low[index])


def _scaffolds(rows: _Rows) -> pa.RecordBatch:
    """The scaffolds of the molecules, with their counts."""
    smiles = rows.mapped.column("scaffold_smiles").take(pa.array(rows.index))
    check_one_smiles_per_key(rows.scaffold_key, smiles)
    starts = np.flatnonzero(is_first(rows.scaffold_key))
    counts = np.diff(starts, append=len(rows.scaffold_key))
    cyclic = rows.scaffold_key[starts] != ACYCLIC_KEY
    examples = rows.mapped.take(pa.array(rows.index[starts[cyclic]]))
    columns = [examples.column(name) for name in ("scaffold_key", "scaffold_smiles", "generic_key")]
    return pa.RecordBatch.from_arrays([*columns, pa.array(counts[cyclic])], schema=SCAFFOLD_SCHEMA)


def _run_hashes(rows: _Rows) -> np.ndarray:
    """The hash of each molecule's run: BLAKE2b-64 of the scaffold key and the first mol_key of the run. uint64 [n]."""
    count = len(rows.index)
    starts = np.flatnonzero(is_first(rows.scaffold_key))
    place = np.arange(count) - np.repeat(starts, np.diff(starts, append=count))
    run_starts = np.flatnonzero((place % RUN_LENGTH == 0) | (rows.scaffold_key == ACYCLIC_KEY))
    words = (
        rows.scaffold_key[run_starts].astype("<u8"),
        rows.mol_key_high[run_starts].astype(">u8"),
        rows.mol_key_low[run_starts].astype(">u8"),
    )
    content = np.column_stack([word.view(np.uint8).reshape(-1, 8) for word in words])
    hashes = np.array([digest64(run.tobytes()) for run in content], dtype=np.uint64)
    return np.repeat(hashes, np.diff(run_starts, append=count))


def _in_validation(scaffold_key: np.ndarray, fraction: float) -> np.ndarray:
    """True where the molecule is for validation: the topmost `fraction` of the range of scaffold keys. bool [n].

    A scaffold is never on both sides; acyclic molecules, whose key is 0, are for training.
    """
    last_training_key = (1 << 64) - 1 - int(fraction * (1 << 64))
    return scaffold_key > np.uint64(last_training_key)


def _ordered_by_run(rows: _Rows, run_hash: np.ndarray, chosen: np.ndarray) -> pa.RecordBatch:
    """The chosen molecules by ascending (run_hash, scaffold_key, mol_key)."""
    index = np.flatnonzero(chosen)
    index = index[np.argsort(run_hash[index], kind="stable")]
    taken = rows.mapped.select(MOLECULE_SCHEMA.names).take(pa.array(rows.index[index]))
    return pa.RecordBatch.from_arrays([*taken.columns, pa.array(run_hash[index])], schema=REDUCED_SCHEMA)


def _write_file(path: str, schema: pa.Schema, batches: list[pa.RecordBatch]) -> None:
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
