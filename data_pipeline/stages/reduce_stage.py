"""Reduce: one partition of the mapped molecules -> without duplicates, cut into runs, ready to be dealt to shards.

A run is up to `RUN_LENGTH` molecules of one scaffold, by ascending mol_key; an acyclic molecule is a run of its own.
Runs are ordered by a hash, so that a shard is a fair sample of the whole, while the molecules of a run stay together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipeline.execution.task import Task, work_file
from data_pipeline.execution.watch import Watch
from data_pipeline.keys import digest64, is_first, range_of
from data_pipeline.molecules.scaffold import ACYCLIC_KEY
from data_pipeline.schema import MOLECULE_SCHEMA, RUN_LENGTH, SCAFFOLD_SCHEMA, SPLITS
from data_pipeline.stages.known import KNOWN_SCHEMA, Known, check_one_smiles_per_key, known_scaffolds, merge_scaffolds
from data_pipeline.stages.partitions import (
    MAPPED_SCHEMA,
    Inputs,
    batches_for,
    concatenate,
    cut,
    mol_key_words,
    read_listing,
    read_partition,
    write_batches,
)
from data_pipeline.stages.ranges import EVERYTHING, KeyRange, cell_bits
from data_pipeline.stages.statistics import SplitStatistics

# A molecule, and the hash of its run.
REDUCED_SCHEMA = MOLECULE_SCHEMA.append(pa.field("run_hash", pa.uint64()))

_WORD_BITS = 64
_MOST_BATCHES = 1024


@dataclass(frozen=True)
class ReduceResult:
    """`statistics` of the new molecules by split; `excluded`: molecules that the user asked to leave out."""

    duplicates: int
    excluded: int
    statistics: dict[str, SplitStatistics]


@dataclass(frozen=True)
class ReduceTask(Task[ReduceResult]):
    """Reduce what of partition `partition`, of `partitions`, lies in `keys`.

    known_scaffolds: scaffolds.parquet of the dataset that is appended to. cell_rows: as `ranges.CELL_ROWS`; cells: as
    `ranges.Cut`, None when `keys` is the whole partition.
    """

    work: str
    partition: int
    partitions: int
    inputs: Inputs
    known_scaffolds: str | None
    validation_fraction: float
    cell_rows: int
    keys: KeyRange = EVERYTHING
    cells: tuple[tuple[int, int], ...] | None = None

    def __str__(self) -> str:
        return f"partition {self.partition}"

    @property
    def identity(self) -> tuple[object, ...]:
        keys = (self.partition, self.partitions, self.keys, self.cells, self.cell_rows)
        return (self.inputs.identity, *keys, self.validation_fraction)

    @property
    def reduced_file(self) -> str:
        """The molecules (`write_reduced`)."""
        return work_file(self.work, "reduced", self.key)

    @property
    def scaffolds_file(self) -> str:
        """The scaffolds, those of known molecules among them: one record batch, ascending by key."""
        return work_file(self.work, "scaffolds", self.key)

    def outputs(self, result: ReduceResult) -> list[str]:
        return [self.reduced_file, self.scaffolds_file]

    def run(self, watch: Watch) -> ReduceResult:
        """Reduce the partition.

        Raises:
            PipelineError: two scaffolds have the same key.
        """
        mapped = concatenate(list(self._rows(self.inputs.mapped, MAPPED_SCHEMA)), MAPPED_SCHEMA)
        mol_keys = mapped.column("mol_key")
        known = Known.look_up(mol_keys, self._rows(self.inputs.known, KNOWN_SCHEMA))
        excluded = Known.look_up(mol_keys, self._rows(self.inputs.excluded, KNOWN_SCHEMA))
        distinct = _Rows.distinct(mapped).where(~known.found)
        rows = distinct.where(~excluded.found)
        scaffolds = known_scaffolds(self.known_scaffolds, known.scaffold_keys, known.scaffold_counts)
        write_batches(self.scaffolds_file, SCAFFOLD_SCHEMA, [merge_scaffolds(scaffolds, _scaffolds(rows))])

        run_hash = _run_hashes(rows, self._cell_bits(mapped, rows))
        in_validation = is_held_out(rows.scaffold_key, self.validation_fraction)
        splits = [_ordered_by_run(rows, run_hash, chosen) for chosen in (~in_validation, in_validation)]
        write_reduced(self.reduced_file, splits)
        return ReduceResult(
            duplicates=mapped.num_rows - len(distinct.index),
            excluded=len(distinct.index) - len(rows.index),
            statistics={split: SplitStatistics.of(batch) for split, batch in zip(SPLITS, splits, strict=True)},
        )

    def _rows(self, listing: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for batch in read_partition(read_listing(listing), self.partition, self.partitions):
            yield self.keys.filter(batch.select(schema.names))

    def _cell_bits(self, mapped: pa.RecordBatch, rows: "_Rows") -> np.ndarray:
        """By how many leading bits of its mol_key each molecule's cell is numbered: int64 [n]."""
        if self.cells is None:
            keys, counts = np.unique(mapped.column("scaffold_key").to_numpy(), return_counts=True)
            bits = cell_bits(counts, self.cell_rows)
        else:
            keys = np.array([key for key, _ in self.cells], dtype=np.uint64)
            bits = np.array([bits for _, bits in self.cells], dtype=np.int64)
        place = np.searchsorted(keys, rows.scaffold_key)
        found = place < len(keys)
        found[found] = keys[place[found]] == rows.scaffold_key[found]
        result = np.zeros(len(rows.index), dtype=np.int64)
        result[found] = bits[place[found]]
        return result


def is_held_out(scaffold_key: np.ndarray, fraction: float) -> np.ndarray:
    """True where the molecule is for validation: the topmost `fraction` of the range of scaffold keys. bool [n].

    A scaffold is never on both sides; acyclic molecules, whose key is 0, are for training.
    """
    last_training_key = (1 << _WORD_BITS) - 1 - int(fraction * (1 << _WORD_BITS))
    return scaffold_key > np.uint64(last_training_key)


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
        scaffold_key = mapped.column("scaffold_key").to_numpy()
        high, low = mol_key_words(mapped.column("mol_key"))
        # Stable: equal keys stay in the order of reading.
        order = np.lexsort((low, high, scaffold_key))
        index = order[is_first(high[order], low[order])]
        return cls(mapped, index, scaffold_key[index], high[index], low[index])

    def where(self, chosen: np.ndarray) -> "_Rows":
        """The molecules that are `chosen`, bool [rows of mapped]."""
        kept = chosen[self.index]
        keys = (self.scaffold_key[kept], self.mol_key_high[kept], self.mol_key_low[kept])
        return _Rows(self.mapped, self.index[kept], *keys)


def _scaffolds(rows: _Rows) -> pa.RecordBatch:
    """The scaffolds of the molecules, with their counts."""
    smiles = rows.mapped.column("scaffold_smiles").take(pa.array(rows.index))
    check_one_smiles_per_key(rows.scaffold_key, smiles)
    starts = np.flatnonzero(is_first(rows.scaffold_key))
    counts = np.diff(starts, append=len(rows.scaffold_key))
    cyclic = rows.scaffold_key[starts] != ACYCLIC_KEY
    examples = pa.array(rows.index[starts[cyclic]])
    columns = [rows.mapped.column(name).take(examples) for name in ("scaffold_key", "scaffold_smiles", "generic_key")]
    return pa.RecordBatch.from_arrays([*columns, pa.array(counts[cyclic])], schema=SCAFFOLD_SCHEMA)


def _run_hashes(rows: _Rows, bits: np.ndarray) -> np.ndarray:
    """The hash of each molecule's run: BLAKE2b-64 of the scaffold key and the first mol_key of the run. uint64 [n].

    `bits` [n]: runs do not cross from one cell of a scaffold into the next.
    """
    count = len(rows.index)
    # A shift by all 64 bits is undefined, and a single cell needs none.
    shift = np.where(bits > 0, _WORD_BITS - bits, 0).astype(np.uint64)
    cell = np.where(bits > 0, rows.mol_key_high >> shift, np.uint64(0))
    starts = np.flatnonzero(is_first(rows.scaffold_key, cell))
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


def _ordered_by_run(rows: _Rows, run_hash: np.ndarray, chosen: np.ndarray) -> pa.RecordBatch:
    """The chosen molecules by ascending (run_hash, scaffold_key, mol_key)."""
    index = np.flatnonzero(chosen)
    index = index[np.argsort(run_hash[index], kind="stable")]
    taken = rows.mapped.select(MOLECULE_SCHEMA.names).take(pa.array(rows.index[index]))
    return pa.RecordBatch.from_arrays([*taken.columns, pa.array(run_hash[index])], schema=REDUCED_SCHEMA)


def write_reduced(path: str, splits: Sequence[pa.RecordBatch]) -> None:
    """Write molecules with `REDUCED_SCHEMA`, of each split ascending by run_hash: a record batch for each of some equal
    ranges of it. How many, the metadata of the schema say."""
    counts = [batches_for(rows.num_rows, _MOST_BATCHES) for rows in splits]
    metadata = {split: str(count) for split, count in zip(SPLITS, counts, strict=True)}
    batches = (
        piece
        for rows, count in zip(splits, counts, strict=True)
        for piece in cut(rows, np.bincount(range_of(rows.column("run_hash").to_numpy(), count), minlength=count))
    )
    write_batches(path, REDUCED_SCHEMA.with_metadata(metadata), batches)


def read_reduced(path: str, split: str, low: int, high: int) -> list[pa.RecordBatch]:
    """Of what `write_reduced` wrote, the molecules of a split whose run_hash is at least `low` and below `high`."""
    with pa.OSFile(path) as source:
        file = pa.ipc.open_file(source)
        counts = [int(file.schema.metadata[name.encode()]) for name in SPLITS]
        first, count = sum(counts[: SPLITS.index(split)]), counts[SPLITS.index(split)]
        begin, end = low * count >> _WORD_BITS, ((high - 1) * count >> _WORD_BITS) + 1
        batches = [file.get_batch(first + index) for index in range(begin, end)]
    # Copies, as a slice keeps the rows about it in memory too.
    wanted = (between(batch, low, high) for batch in batches)
    return [rows.take(pa.array(np.arange(rows.num_rows))) for rows in wanted if rows.num_rows]


def between(rows: pa.RecordBatch, low: int, high: int) -> pa.RecordBatch:
    """Of rows ascending by run_hash those whose run_hash is at least `low` and below `high`: a slice."""
    hashes = rows.column("run_hash").to_numpy()
    begin = int(np.searchsorted(hashes, np.uint64(low)))
    end = int(np.searchsorted(hashes, np.uint64(high - 1), side="right"))
    return rows.slice(begin, end - begin)
