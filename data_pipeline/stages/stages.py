"""The stages of a build in their order: read, map, shuffle by scaffold, reduce, write.

The bytes written follow from the sources and the options alone, not from the workers, the memory or interruptions. An
append is the same, with an index stage, which reads what the dataset holds already.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import rdkit

from data_pipeline.errors import PipelineError
from data_pipeline.execution.executor import TaskExecutor
from data_pipeline.manifest import (
    MANIFEST_FILE,
    Counts,
    ExclusionRecord,
    FileRecord,
    Manifest,
    ShardRecord,
    SourceRecord,
    SplitRecord,
)
from data_pipeline.molecules.rejects import rejects_in_words
from data_pipeline.output import (
    REJECTS_FILE,
    SCAFFOLDS_FILE,
    Publication,
    WorkFolder,
    entries_to_replace,
    stray_shards,
)
from data_pipeline.plan import Plan
from data_pipeline.schema import REJECT_SCHEMA, SPLITS
from data_pipeline.sources.formats import SYNTH
from data_pipeline.sources.source import Source
from data_pipeline.sources.streams import file_name, split_compression
from data_pipeline.sources.synth import parse_synth
from data_pipeline.stages.huggingface import write_dataset_dict
from data_pipeline.stages.known import IndexTask
from data_pipeline.stages.map_stage import MapResult, MapTask
from data_pipeline.stages.parquet import ParquetSink
from data_pipeline.stages.partitions import Inputs, read_batch, write_listing
from data_pipeline.stages.ranges import CELL_ROWS, CutTask, mapped_bytes
from data_pipeline.stages.read_stage import ReadTask
from data_pipeline.stages.reduce_stage import ReduceTask
from data_pipeline.stages.scaffold_table import ScaffoldTable
from data_pipeline.stages.statistics import DescriptorSums, SplitStatistics
from data_pipeline.stages.write_stage import WriteTask, shard_file

# Rows of a chunk, which is what is lost when a worker is killed: few for a small source, so that all workers have some
# of it; many for a large one, as each chunk leaves a piece in each partition.
CHUNK_ROWS = (4096, 65_536)
_CHUNKS = 512
# Molecules in a partition, about: what a reduce task of the default memory holds easily.
PARTITION_ROWS = 1 << 18
# Molecules that a dataset holds already, per partition of an append: a reduce task looks through their keys.
PARTITION_KNOWN_ROWS = 1 << 20
# Shards of larger molecules than this, on the mean, have fewer of them.
SHARD_ATOMS = 32
# Each write task opens all files of the reduce tasks, so with many shards it writes several, as far as memory allows.
_WRITE_TASKS = 1024
_TEXT_BYTES = 48
_COMPRESSION = 4

# Called with the stage ("read", "map", "exclude", "index", "reduce", "write"), what is done of it (sources, rows, rows,
# shards, partitions, shards), and of how many.
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PrepareResult:
    """`reused`: the dataset was there already, from these sources and options, and nothing was done.

    counts: what became of the rows that were read now, None when none were; the manifest's are of all that ever were.
    tasks, resumed: pieces of the work, and how many of them an interrupted run had left done.
    """

    manifest: Manifest
    counts: Counts | None
    tasks: int = 0
    resumed: int = 0

    @property
    def reused(self) -> bool:
        return self.counts is None


@dataclass(frozen=True)
class _Chunks:
    """A source that was read: the task that did it, and the rows of each chunk."""

    source: Source
    read: ReadTask
    rows: list[int]


@dataclass
class _Mapped:
    """What the map tasks made of some sources. `rows` by source; the rest in sum."""

    tasks: list[MapTask]
    rows: list[int]
    rejected: list[Counter[str]]
    duplicates: int
    standardized: int
    partition_rows: np.ndarray
    partition_atoms: np.ndarray

    def add(self, source: int, task: MapTask, result: MapResult) -> None:
        self.tasks.append(task)
        self.rows[source] += result.rows
        self.rejected[source].update(result.rejected)
        self.duplicates += result.duplicates
        self.standardized += result.standardized
        self.partition_rows += result.partition_rows
        self.partition_atoms += result.partition_atoms

    @property
    def files(self) -> list[str]:
        return [task.mapped_file for task in self.tasks]


@dataclass
class _Reduced:
    """What the reduce tasks found. `statistics` of new molecules, by split."""

    tasks: list[ReduceTask]
    duplicates: int
    excluded: int
    statistics: dict[str, SplitStatistics]


@dataclass
class _Shards:
    """The shards of a split, by the names they get, and by those they have in the work folder; sums over them."""

    records: list[ShardRecord]
    built: list[str]
    descriptors: DescriptorSums


class Build:
    """One run: the stages in their order, each with what it needs of the stage before."""

    def __init__(
        self, plan: Plan, out: Path, work: WorkFolder, executor: TaskExecutor, budget: int, report: Report
    ) -> None:
        self._plan = plan
        self._options = plan.options
        self._existing = plan.existing
        self._out = out
        self._keep = work
        self._work = str(work.path)
        self._dataset = work.dataset(plan.key)
        self._executor = executor
        self._budget = budget
        self._report = report
        self._partitions = 1

    def run(self) -> Publication[PrepareResult]:
        """Build the dataset; of an append, all but the shards that are there already."""
        chunks = self._read(self._plan.sources, self._options.smiles_column, self._options.id_column)
        excluded_chunks = self._read(self._plan.exclude, self._options.exclude_smiles_column, None)
        self._partitions = self._partition_count(chunks, excluded_chunks)
        mapped = self._map("map", chunks)
        self._check_not_empty(mapped)
        excluded = self._map("exclude", excluded_chunks)
        known, statistics = self._index()
        reduced = self._reduce(mapped, excluded, known)
        scaffolds = self._collect_scaffolds(reduced)
        self._collect_rejects(mapped)
        shards = self._write(reduced)
        for split in SPLITS:
            statistics[split].add(reduced.statistics[split])
            statistics[split].descriptors.add(shards[split].descriptors)
        counts = self._counts(mapped, reduced)
        manifest = self._manifest(mapped, excluded, counts, self._splits(statistics, scaffolds, shards))
        manifest.save(self._dataset)
        result = PrepareResult(manifest, counts, self._executor.tasks, self._executor.resumed)
        return self._publication(manifest, shards, result)

    def _read(self, sources: list[Source], smiles_column: str | None, id_column: str | None) -> list[_Chunks]:
        rows = _chunk_rows(sources)
        tasks = [ReadTask(self._work, source, smiles_column, id_column, rows) for source in sources]
        chunks = []
        for task, result in zip(tasks, self._executor.run(tasks), strict=True):
            chunks.append(_Chunks(task.source, task, result))
            self._report("read", len(chunks), len(tasks))
        return chunks

    def _partition_count(self, chunks: list[_Chunks], excluded: list[_Chunks]) -> int:
        """So many that one fits in memory; a power of two, so that a source more seldom changes it."""
        rows = sum(sum(source.rows) for source in chunks) / PARTITION_ROWS
        keys = sum(sum(source.rows) for source in excluded) + (self._existing.rows if self._existing else 0)
        return _power_of_two(math.ceil(max(rows, keys / PARTITION_KNOWN_ROWS, 1)))

    def _map(self, stage: str, chunks: list[_Chunks]) -> _Mapped:
        tasks = [(index, task) for index, source in enumerate(chunks) for task in self._map_tasks(source)]
        zeros = np.zeros(self._partitions, dtype=np.int64)
        mapped = _Mapped([], [0] * len(chunks), [Counter() for _ in chunks], 0, 0, zeros, zeros.copy())
        total = sum(sum(source.rows) for source in chunks)
        results = self._executor.run(task for _, task in tasks)
        for (source, task), result in zip(tasks, results, strict=True):
            mapped.add(source, task, result)
            self._keep.keep = True
            self._report(stage, sum(mapped.rows), total)
        return mapped

    def _map_tasks(self, source: _Chunks) -> Iterator[MapTask]:
        options = self._options
        settings = (self._partitions, options.max_atoms, options.standardize, options.molecule_seconds)
        first_row = 0
        for chunk, rows in enumerate(source.rows):
            yield MapTask(self._work, source.read.key, source.source.name, chunk, first_row, *settings)
            first_row += rows

    def _index(self) -> tuple[list[str], dict[str, SplitStatistics]]:
        """Index what the dataset holds already: files of keys, and the statistics of each split."""
        statistics = {split: SplitStatistics() for split in SPLITS}
        if self._existing is None:
            return [], statistics
        shards, folder = self._existing.shards, self._existing.folder
        tasks = [IndexTask(self._work, str(folder / s.file), s.blake2b, self._partitions) for _, s in shards]
        for done, ((split, _), part) in enumerate(zip(shards, self._executor.run(tasks), strict=True), start=1):
            statistics[split].add(part)
            self._report("index", done, len(tasks))
        return [task.known_file for task in tasks], statistics

    def _reduce(self, mapped: _Mapped, excluded: _Mapped, known: list[str]) -> _Reduced:
        inputs = Inputs(*(write_listing(self._work, files) for files in (mapped.files, known, excluded.files)))
        tasks = self._reduce_tasks(mapped, inputs)
        reduced = _Reduced(tasks, 0, 0, {split: SplitStatistics() for split in SPLITS})
        for done, result in enumerate(self._executor.run(tasks), start=1):
            reduced.duplicates += result.duplicates
            reduced.excluded += result.excluded
            for split in SPLITS:
                reduced.statistics[split].add(result.statistics[split])
            self._report("reduce", done, len(tasks))
        return reduced

    def _reduce_tasks(self, mapped: _Mapped, inputs: Inputs) -> list[ReduceTask]:
        """A task for each partition, or several where it is too large."""
        sizes = mapped_bytes(mapped.partition_rows, mapped.partition_atoms)
        too_large = np.flatnonzero(sizes > self._budget).tolist()
        cut_tasks = [
            CutTask(self._work, inputs.mapped, index, self._partitions, self._budget, CELL_ROWS) for index in too_large
        ]
        cuts = dict(zip(too_large, self._executor.run(cut_tasks), strict=True))
        scaffolds = str(self._existing.scaffolds_file) if self._existing else None
        settings = (scaffolds, self._options.validation_fraction, CELL_ROWS)
        tasks = []
        for index in range(self._partitions):
            whole = ReduceTask(self._work, index, self._partitions, inputs, *settings)
            if index in cuts:
                cut = cuts[index]
                tasks += [dataclasses.replace(whole, keys=keys, cells=cut.cells) for keys in cut.ranges]
            else:
                tasks.append(whole)
        return tasks

    def _check_not_empty(self, mapped: _Mapped) -> None:
        if mapped.partition_rows.any():
            return
        reasons = rejects_in_words(dict(_total(mapped.rejected).most_common(3)))
        names = ", ".join(source.name for source in self._plan.sources)
        self._keep.keep = False
        raise PipelineError(
            f"{names}: no molecule among {sum(mapped.rows)} rows (rejected: {reasons or 'none'}); "
            "check that the files hold SMILES; name their column with --smiles-column, or their format with --format"
        )

    def _collect_scaffolds(self, reduced: _Reduced) -> dict[str, int]:
        """Write the table of scaffolds. Returns the number of them in each split."""
        with ScaffoldTable(self._dataset / SCAFFOLDS_FILE, self._options.validation_fraction) as table:
            # Partitions and what they are cut into are ranges of scaffold keys, so one after the other they are sorted.
            for task in reduced.tasks:
                table.append(read_batch(task.scaffolds_file, 0))
        return table.count_by_split

    def _collect_rejects(self, mapped: _Mapped) -> None:
        with ParquetSink(self._dataset / REJECTS_FILE, REJECT_SCHEMA) as rejects:
            for batch in self._existing.rejects() if self._existing else ():
                rejects.append(batch)
            for task in mapped.tasks:
                rejects.append(read_batch(task.rejects_file, 0))

    def _write(self, reduced: _Reduced) -> dict[str, _Shards]:
        listing = write_listing(self._work, [task.reduced_file for task in reduced.tasks])
        tasks = [task for split in SPLITS for task in self._write_tasks(split, reduced.statistics[split], listing)]
        total = sum(task.count for task in tasks)
        written = {split: _Shards([], [], DescriptorSums()) for split in SPLITS}
        done = 0
        for task, result in zip(tasks, self._executor.run(tasks), strict=True):
            split = written[task.split]
            split.descriptors.add(result.descriptors)
            for shard in result.shards:
                # An append goes on after the shards that are there, without a gap for an empty one.
                if shard.rows or self._existing is None:
                    number = self._first_shard(task.split) + len(split.records)
                    split.records.append(dataclasses.replace(shard, file=shard_file(task.split, number)))
                    split.built.append(shard.file)
            done += task.count
            self._report("write", done, total)
        for name, found in written.items():
            if sum(shard.rows for shard in found.records) != reduced.statistics[name].rows:
                raise PipelineError(f"{name}: the shards do not hold all molecules; please report this")
        return written

    def _write_tasks(self, split: str, statistics: SplitStatistics, listing: str) -> Iterator[WriteTask]:
        shards, options = self._shard_count(statistics), self._options
        group = shards_at_a_time(shards, mapped_bytes(statistics.rows, statistics.atoms), self._budget)
        for first in range(0, shards, group):
            count = min(group, shards - first)
            settings = (options.targets, options.molecule_seconds)
            yield WriteTask(self._work, listing, split, first, count, shards, *settings)

    def _shard_count(self, statistics: SplitStatistics) -> int:
        rows = max(statistics.rows, statistics.atoms / SHARD_ATOMS)
        count = math.ceil(rows / self._options.shard_rows)
        # `datasets` wants a shard even in an empty split.
        return count if self._existing else max(1, count)

    def _first_shard(self, split: str) -> int:
        return len(self._existing.manifest.splits[split].shards) if self._existing else 0

    def _counts(self, mapped: _Mapped, reduced: _Reduced) -> Counts:
        counts = Counts(
            read=sum(mapped.rows),
            written={split: reduced.statistics[split].rows for split in SPLITS},
            duplicates=mapped.duplicates + reduced.duplicates,
            excluded=reduced.excluded,
            rejected=dict(sorted(_total(mapped.rejected).items())),
            standardized=mapped.standardized,
        )
        if counts.unaccounted:
            raise PipelineError(f"{counts.unaccounted} rows read are unaccounted for; please report this: {counts}")
        return counts

    def _splits(
        self, statistics: dict[str, SplitStatistics], scaffolds: dict[str, int], shards: dict[str, _Shards]
    ) -> dict[str, SplitRecord]:
        old = {split: self._existing.manifest.splits[split].shards if self._existing else [] for split in SPLITS}
        return {
            split: _split_record(
                statistics[split], scaffolds[split], old[split] + shards[split].records, self._options.targets
            )
            for split in SPLITS
        }

    def _manifest(self, mapped: _Mapped, excluded: _Mapped, counts: Counts, splits: dict[str, SplitRecord]) -> Manifest:
        options = self._options
        columns = (options.smiles_column, options.id_column)
        files = write_dataset_dict(self._dataset, {name: split.shards for name, split in splits.items()})
        old = self._existing.manifest if self._existing else None
        sources = [SourceRecord.of(s, rows, *columns) for s, rows in zip(self._plan.sources, mapped.rows, strict=True)]
        exclusions = [
            ExclusionRecord(source.name, source.bytes, source.blake2b, rows, rejected.total())
            for source, rows, rejected in zip(self._plan.exclude, excluded.rows, excluded.rejected, strict=True)
        ]
        return Manifest(
            versions={"rdkit": rdkit.__version__, "pyarrow": pa.__version__},
            options=old.options if old else dataclasses.asdict(options),
            sources=old.sources + sources if old else sources,
            exclusions=exclusions,
            counts=old.counts + counts if old else counts,
            splits=splits,
            files=[FileRecord.of(self._dataset, file) for file in (*files, SCAFFOLDS_FILE, REJECTS_FILE)],
        )

    def _publication(
        self, manifest: Manifest, shards: dict[str, _Shards], result: PrepareResult
    ) -> Publication[PrepareResult]:
        moves = [
            (built, record.file)
            for split in shards.values()
            for built, record in zip(split.built, split.records, strict=True)
        ]
        folder = self._dataset.name
        moves += [(f"{folder}/{file}", file) for file in (*(record.file for record in manifest.files), MANIFEST_FILE)]
        old = self._existing.manifest if self._existing else None
        remove = entries_to_replace() if old is None else stray_shards(self._out, old)
        return Publication(self._plan.key, result, remove, moves)


def shards_at_a_time(shards: int, size: int, budget: int) -> int:
    """How many of `shards` shards, of `size` bytes in all, a write task writes: so many that there are not too many
    tasks, which all open the same files, and not more than fit in `budget` bytes."""
    return max(min(math.ceil(shards / _WRITE_TASKS), shards * budget // max(size, 1)), 1)


def _chunk_rows(sources: list[Source]) -> int:
    least, most = CHUNK_ROWS
    rows = sum(map(_text_bytes, sources)) / _TEXT_BYTES
    return min(max(_power_of_two(math.ceil(max(rows / _CHUNKS, 1))), least), most)


def _text_bytes(source: Source) -> int:
    """Characters of text in a source, about."""
    if source.format == SYNTH:
        return parse_synth(source.path).count * _TEXT_BYTES
    _, compression = split_compression(file_name(source.path))
    return source.bytes * (_COMPRESSION if compression else 1)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _total(counters: Sequence[Counter[str]]) -> Counter[str]:
    return sum(counters, Counter())


def _split_record(statistics: SplitStatistics, scaffolds: int, shards: list[ShardRecord], targets: bool) -> SplitRecord:
    return SplitRecord(
        rows=statistics.rows,
        atoms=statistics.atoms,
        bonds=statistics.bonds,
        max_atoms=statistics.max_atoms,
        max_bonds=statistics.max_bonds,
        scaffolds=scaffolds,
        acyclic=statistics.acyclic,
        complexity_percentiles=statistics.complexity_percentiles(),
        shards=shards,
        descriptors=statistics.descriptors.records() if targets else [],
    )
