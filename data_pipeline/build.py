"""Sources -> a dataset folder: plan, map, shuffle by scaffold, reduce, write.

The bytes written follow from the sources and the options alone, not from the number of workers or partitions. An append
is the same, with an index stage before it, which reads what the dataset holds already.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import rdkit

from data_pipeline.append import Existing
from data_pipeline.chemistry import DEFAULT_MAX_ATOMS
from data_pipeline.encode import reject_batch
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.huggingface import write_dataset_dict
from data_pipeline.known import IndexTask, run_index
from data_pipeline.manifest import MANIFEST_FILE, Counts, FileRecord, Manifest, ShardRecord, SourceRecord, SplitRecord
from data_pipeline.map_stage import MapTask, run_map
from data_pipeline.output import REJECTS_FILE, SCAFFOLDS_FILE, check_writable, publish, publish_append, work_folder
from data_pipeline.parquet import ParquetSink
from data_pipeline.partitions import mapped_file
from data_pipeline.reduce_stage import ReduceTask, run_reduce, scaffolds_file
from data_pipeline.remote import is_url, one_line
from data_pipeline.schema import ATOM_FEATURE_SIZES, REJECT_SCHEMA, SCAFFOLD_SCHEMA, SPLITS
from data_pipeline.sources import Source, check_columns, read_chunks, resolve_sources
from data_pipeline.statistics import SplitStatistics
from data_pipeline.workers import Workers
from data_pipeline.write_stage import WriteTask, run_write, shard_file

# Source text per partition: some 150,000 molecules, which a reduce task holds in some 300 MB.
PARTITION_BYTES = 8 << 20
# Molecules that a dataset holds already, per partition of an append: a reduce task holds their keys.
PARTITION_KNOWN_ROWS = 1 << 20
_GZIP_RATIO = 4

# Called with the stage ("index", "map", "reduce", "write"), what is done of it (shards, rows, partitions, shards), and
# of how many.
Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class PrepareOptions:
    """What, besides the sources, decides the content of a dataset.

    smiles_column, id_column: names in the header of the sources, found by themselves when None;
    validation_fraction: share of the scaffolds, in [0, 1); shard_rows: molecules in a shard, about;
    max_atoms: larger molecules are rejected; standardize: store the standard form of molecules (`standardize`).
    """

    smiles_column: str | None = None
    id_column: str | None = None
    validation_fraction: float = 0.05
    shard_rows: int = 65_536
    max_atoms: int = DEFAULT_MAX_ATOMS
    standardize: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UsageError(f"validation_fraction is {self.validation_fraction}; expected a number in [0, 1)")
        for name in ("shard_rows", "max_atoms"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")
        # Arrow's list columns count their values in 31 bits; shards vary in size, so leave room.
        if 2 * self.shard_rows * self.max_atoms * len(ATOM_FEATURE_SIZES) >= 1 << 31:
            raise UsageError(
                f"shard_rows {self.shard_rows} x max_atoms {self.max_atoms} is too large for an Arrow column; "
                "expected a product below 119 million: lower one of them"
            )


@dataclass(frozen=True)
class PrepareResult:
    """`reused`: the dataset was there already, from these sources and options, and nothing was done.

    `counts`: what became of the rows that were read now, None when none were; the manifest's are of all that ever were.
    """

    manifest: Manifest
    counts: Counts | None

    @property
    def reused(self) -> bool:
        return self.counts is None


def prepare(
    sources: Sequence[str],
    out: str | Path,
    options: PrepareOptions | None = None,
    workers: int = 1,
    report: Report | None = None,
    overwrite: bool = False,
    append: bool = False,
) -> PrepareResult:
    """Prepare a dataset folder `out` from `sources`: paths, glob patterns, or `nci5k`.

    `overwrite`: in place of a dataset in `out`. `append`: add to the dataset in `out` what it does not hold; sources
    that were read into it before are left out.

    Call it under `if __name__ == "__main__":` when `workers` > 1: worker processes import the main module.

    Raises:
        UsageError: a source or a column that is not there; `out` holds something else, or a dataset of other
            sources or options and neither `overwrite` nor `append` is True; an append to no dataset, or to one of
            other options or another RDKit.
        PipelineError: an unreadable source, no molecules at all, a dead worker, no space.
    """
    options = options or PrepareOptions()
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected at least 1")
    if overwrite and append:
        raise UsageError("overwrite and append are both True; expected one of them at most")
    if is_url(out):
        raise UsageError(f"--out {out} is a URL: prepare into a folder, then upload it (docs/object_storage.md)")
    out = Path(out)
    try:
        existing = Existing.load(out, dataclasses.asdict(options)) if append else None
        check_writable(out)
        resolved = resolve_sources(sources)
        for source in resolved:
            check_columns(source, options.smiles_column, options.id_column)
        if existing is not None:
            resolved = existing.new_sources(resolved, options.smiles_column, options.id_column)
            if not resolved:
                return PrepareResult(existing.manifest, None)
        elif not overwrite and (out / MANIFEST_FILE).exists():
            return PrepareResult(_matching_manifest(out, resolved, options), None)
        with work_folder(out) as work, Workers(workers) as pool:
            build = _Build(resolved, options, existing, work, pool, report or _no_report)
            result = build.run()
            if existing is None:
                publish(build.dataset, out)
            else:
                publish_append(build.dataset, out, existing.manifest, result.manifest)
        return result
    except OSError as error:
        raise PipelineError(f"{out}: cannot write the dataset: {error}") from error
    except pa.ArrowException as error:
        # Of files that others wrote, an append alone reads Arrow's and Parquet's.
        raise PipelineError(
            f"{out}: a file of the dataset that is appended to is damaged ({one_line(error)}); `hmoe inspect {out}` "
            "names it; prepare the dataset again"
        ) from error


def _matching_manifest(out: Path, sources: list[Source], options: PrepareOptions) -> Manifest:
    """The manifest of the dataset in `out`, if it comes from the same sources and options; UsageError otherwise."""
    manifest = Manifest.load(out)
    same_sources = len(sources) == len(manifest.sources) and all(
        record.is_of(source) for source, record in zip(sources, manifest.sources, strict=True)
    )
    if same_sources and dataclasses.asdict(options) == manifest.options:
        return manifest
    different = "options" if same_sources else "sources"
    raise UsageError(
        f"{out}: holds a dataset prepared from other {different}; choose another --out, or replace it: --overwrite"
        + (", or add to it: --append" if different == "sources" else "")
    )


def _no_report(stage: str, done: int, total: int | None) -> None:
    pass


@dataclass
class _MapTotals:
    """What the map tasks found. `rows` by source."""

    tasks: int
    rows: list[int]
    rejected: Counter[str]
    standardized: int = 0


@dataclass
class _Reduced:
    """What the reduce tasks found. `statistics` of new molecules and `scaffolds` of all, by split."""

    duplicates: int
    statistics: dict[str, SplitStatistics]
    scaffolds: Counter[str]


class _Build:
    """One run: the stages in their order, each with what it needs of the stage before."""

    def __init__(
        self,
        sources: list[Source],
        options: PrepareOptions,
        existing: Existing | None,
        work: Path,
        pool: Workers,
        report: Report,
    ) -> None:
        self.dataset = work / "dataset"
        self._sources = sources
        self._options = options
        self._existing = existing
        self._work = str(work)
        self._pool = pool
        self._report = report
        self._partitions = _partition_count(sources, existing.rows if existing else 0)

    def run(self) -> PrepareResult:
        """Build the dataset in the folder `dataset`; of an append, all but the shards that are there already."""
        for split in SPLITS:
            (self.dataset / split).mkdir(parents=True)
        statistics = self._index()
        mapped = self._map()
        reduced = self._reduce(mapped.tasks)
        self._check_not_empty(mapped, reduced)
        self._collect_scaffolds()
        shards = self._write(reduced.statistics)
        counts = self._counts(mapped, reduced.duplicates, shards)
        for split in SPLITS:
            statistics[split].add(reduced.statistics[split])
        splits = self._splits(statistics, reduced.scaffolds, shards)
        manifest = self._manifest(mapped, counts, splits)
        manifest.save(self.dataset)
        return PrepareResult(manifest, counts)

    def _index(self) -> dict[str, SplitStatistics]:
        """Index what the dataset holds already, and return the statistics of each split."""
        statistics = {split: SplitStatistics() for split in SPLITS}
        if self._existing is None:
            return statistics
        shards, folder = self._existing.shards, self._existing.folder
        tasks = [
            IndexTask(self._work, str(folder / shard.file), number, self._partitions)
            for number, (_, shard) in enumerate(shards)
        ]
        for (split, _), part in zip(shards, self._pool.run(run_index, tasks), strict=True):
            statistics[split].add(part)
        self._report("index", len(tasks), len(tasks))
        return statistics

    def _map(self) -> _MapTotals:
        totals = _MapTotals(0, [0] * len(self._sources), Counter())
        with ParquetSink(self.dataset / REJECTS_FILE, REJECT_SCHEMA) as rejects:
            for batch in self._existing.rejects() if self._existing else ():
                rejects.append(batch)
            for result in self._pool.run(run_map, self._map_tasks()):
                totals.tasks += 1
                totals.rows[result.source_index] += result.rows
                totals.rejected.update(reject.reason for reject in result.rejects)
                totals.standardized += result.standardized
                source = self._sources[result.source_index].name
                rejects.append(reject_batch(source, result.first_row, result.rejects))
                self._report("map", sum(totals.rows), None)
        return totals

    def _map_tasks(self) -> Iterator[MapTask]:
        chunks = (
            chunk
            for index, source in enumerate(self._sources)
            for chunk in read_chunks(source, index, self._options.smiles_column, self._options.id_column)
        )
        for task, chunk in enumerate(chunks):
            path = mapped_file(self._work, task)
            yield MapTask(chunk, path, self._partitions, self._options.max_atoms, self._options.standardize)

    def _reduce(self, map_tasks: int) -> _Reduced:
        fraction = self._options.validation_fraction
        known = (len(self._existing.shards), str(self._existing.scaffolds_file)) if self._existing else (0, None)
        tasks = [ReduceTask(self._work, index, map_tasks, fraction, *known) for index in range(self._partitions)]
        reduced = _Reduced(0, {split: SplitStatistics() for split in SPLITS}, Counter())
        for done, result in enumerate(self._pool.run(run_reduce, tasks), start=1):
            reduced.duplicates += result.duplicates
            reduced.scaffolds.update(result.scaffolds)
            for split in SPLITS:
                reduced.statistics[split].add(result.statistics[split])
            self._report("reduce", done, len(tasks))
        return reduced

    def _check_not_empty(self, mapped: _MapTotals, reduced: _Reduced) -> None:
        if reduced.duplicates or any(split.rows for split in reduced.statistics.values()):
            return
        reasons = ", ".join(f"{reason} {count}" for reason, count in mapped.rejected.most_common(3))
        names = ", ".join(source.name for source in self._sources)
        raise PipelineError(
            f"{names}: no molecule among {sum(mapped.rows)} rows (rejected: {reasons or 'none'}); "
            "check that the files hold SMILES, and name the column with --smiles-column"
        )

    def _collect_scaffolds(self) -> None:
        with ParquetSink(self.dataset / SCAFFOLDS_FILE, SCAFFOLD_SCHEMA) as scaffolds:
            # Partitions are ranges of scaffold keys, so one after the other they are sorted.
            for index in range(self._partitions):
                with pa.OSFile(scaffolds_file(self._work, index)) as source:
                    scaffolds.append(pa.ipc.open_file(source).get_batch(0))

    def _write(self, statistics: dict[str, SplitStatistics]) -> dict[str, list[ShardRecord]]:
        tasks = [task for split in SPLITS for task in self._write_tasks(split, statistics[split].rows)]
        shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        for done, (task, shard) in enumerate(zip(tasks, self._pool.run(run_write, tasks), strict=True), start=1):
            if self._existing is None:
                shards[task.split].append(shard)
            elif shard.rows:
                number = self._first_shard(task.split) + len(shards[task.split])
                shards[task.split].append(self._numbered(shard, shard_file(task.split, number)))
            self._report("write", done, len(tasks))
        return shards

    def _write_tasks(self, split: str, rows: int) -> list[WriteTask]:
        count = math.ceil(rows / self._options.shard_rows)
        if self._existing is None:
            # `datasets` wants a shard even in an empty split.
            count = max(1, count)
        work = (self._work, self._partitions, str(self.dataset))
        return [WriteTask(*work, split, shard, count, self._first_shard(split)) for shard in range(count)]

    def _first_shard(self, split: str) -> int:
        return len(self._existing.manifest.splits[split].shards) if self._existing else 0

    def _numbered(self, shard: ShardRecord, file: str) -> ShardRecord:
        """The shard under the name `file`, which closes the gap that an empty one before it has left."""
        os.replace(self.dataset / shard.file, self.dataset / file)
        return dataclasses.replace(shard, file=file)

    def _counts(self, mapped: _MapTotals, duplicates: int, shards: dict[str, list[ShardRecord]]) -> Counts:
        counts = Counts(
            read=sum(mapped.rows),
            written={split: sum(shard.rows for shard in shards[split]) for split in SPLITS},
            duplicates=duplicates,
            excluded=0,
            rejected=dict(sorted(mapped.rejected.items())),
            standardized=mapped.standardized,
        )
        if counts.unaccounted:
            raise PipelineError(f"{counts.unaccounted} rows read are unaccounted for; please report this: {counts}")
        return counts

    def _splits(
        self, statistics: dict[str, SplitStatistics], scaffolds: Counter[str], shards: dict[str, list[ShardRecord]]
    ) -> dict[str, SplitRecord]:
        old = {split: self._existing.manifest.splits[split].shards if self._existing else [] for split in SPLITS}
        return {
            split: _split_record(statistics[split], scaffolds[split], old[split] + shards[split]) for split in SPLITS
        }

    def _manifest(self, mapped: _MapTotals, counts: Counts, splits: dict[str, SplitRecord]) -> Manifest:
        options = self._options
        columns = (options.smiles_column, options.id_column)
        files = write_dataset_dict(self.dataset, {name: split.shards for name, split in splits.items()})
        old = self._existing.manifest if self._existing else None
        sources = [SourceRecord.of(s, rows, *columns) for s, rows in zip(self._sources, mapped.rows, strict=True)]
        return Manifest(
            versions={"rdkit": rdkit.__version__, "pyarrow": pa.__version__},
            options=old.options if old else dataclasses.asdict(options),
            sources=old.sources + sources if old else sources,
            counts=old.counts + counts if old else counts,
            splits=splits,
            files=[FileRecord.of(self.dataset, file) for file in (*files, SCAFFOLDS_FILE, REJECTS_FILE)],
        )


def _partition_count(sources: list[Source], known_rows: int) -> int:
    """So many partitions that one fits in memory, by the size of the sources and of the dataset appended to."""
    text = sum(s.bytes * _GZIP_RATIO if s.path.lower().endswith(".gz") else s.bytes for s in sources)
    return max(1, math.ceil(text / PARTITION_BYTES), math.ceil(known_rows / PARTITION_KNOWN_ROWS))


def _split_record(statistics: SplitStatistics, scaffolds: int, shards: list[ShardRecord]) -> SplitRecord:
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
    )
