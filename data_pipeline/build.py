"""Sources -> a dataset folder: plan, map, shuffle by scaffold, reduce, write.

The bytes written follow from the sources and the options alone, not from the number of workers or partitions.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import rdkit

from data_pipeline.chemistry import DEFAULT_MAX_ATOMS
from data_pipeline.encode import reject_batch
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.huggingface import write_dataset_dict
from data_pipeline.manifest import MANIFEST_FILE, Counts, FileRecord, Manifest, ShardRecord, SourceRecord, SplitRecord
from data_pipeline.map_stage import MapTask, run_map
from data_pipeline.output import REJECTS_FILE, SCAFFOLDS_FILE, check_writable, publish, work_folder
from data_pipeline.parquet import ParquetSink
from data_pipeline.partitions import mapped_file
from data_pipeline.reduce_stage import ReduceTask, run_reduce, scaffolds_file
from data_pipeline.schema import ATOM_FEATURE_SIZES, REJECT_SCHEMA, SCAFFOLD_SCHEMA, SPLITS
from data_pipeline.sources import Source, check_columns, read_chunks, resolve_sources
from data_pipeline.statistics import SplitStatistics
from data_pipeline.workers import Workers
from data_pipeline.write_stage import WriteTask, run_write

# Source text per partition: some 150,000 molecules, which a reduce task holds in some 300 MB.
PARTITION_BYTES = 8 << 20
_GZIP_RATIO = 4

# Called with the stage ("map", "reduce", "write"), what is done of it (rows, partitions, shards), and of how many.
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
    """`reused`: the dataset was there already, from the same sources and options, and nothing was done."""

    manifest: Manifest
    reused: bool


def prepare(
    sources: Sequence[str],
    out: str | Path,
    options: PrepareOptions | None = None,
    workers: int = 1,
    report: Report | None = None,
    overwrite: bool = False,
) -> PrepareResult:
    """Prepare a dataset folder `out` from `sources`: paths, glob patterns, or `nci5k`.

    Call it under `if __name__ == "__main__":` when `workers` > 1: worker processes import the main module.

    Raises:
        UsageError: a source or a column that is not there; `out` holds something else, or a dataset of other
            sources or options and `overwrite` is False.
        PipelineError: an unreadable source, no molecules at all, a dead worker, no space.
    """
    options = options or PrepareOptions()
    if workers < 1:
        raise UsageError(f"workers is {workers}; expected at least 1")
    out = Path(out)
    try:
        check_writable(out)
        resolved = resolve_sources(sources)
        for source in resolved:
            check_columns(source, options.smiles_column, options.id_column)
        if not overwrite and (out / MANIFEST_FILE).exists():
            return PrepareResult(_matching_manifest(out, resolved, options), reused=True)
        with work_folder(out) as work, Workers(workers) as pool:
            build = _Build(resolved, options, work, pool, report or _no_report)
            manifest = build.run()
            publish(build.dataset, out)
        return PrepareResult(manifest, reused=False)
    except OSError as error:
        raise PipelineError(f"{out}: cannot write the dataset: {error}") from error


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


class _Build:
    """One run: the stages in their order, each with what it needs of the stage before."""

    def __init__(
        self, sources: list[Source], options: PrepareOptions, work: Path, pool: Workers, report: Report
    ) -> None:
        self.dataset = work / "dataset"
        self._sources = sources
        self._options = options
        self._work = str(work)
        self._pool = pool
        self._report = report
        self._partitions = _partition_count(sources)

    def run(self) -> Manifest:
        """Build the dataset in the folder `dataset` and return its manifest."""
        for split in SPLITS:
            (self.dataset / split).mkdir(parents=True)
        mapped = self._map()
        duplicates, statistics = self._reduce(mapped.tasks)
        self._check_not_empty(mapped, statistics)
        self._collect_scaffolds()
        shards = self._write(statistics)
        manifest = self._manifest(mapped, duplicates, statistics, shards)
        manifest.save(self.dataset)
        return manifest

    def _map(self) -> _MapTotals:
        totals = _MapTotals(0, [0] * len(self._sources), Counter())
        with ParquetSink(self.dataset / REJECTS_FILE, REJECT_SCHEMA) as rejects:
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

    def _reduce(self, map_tasks: int) -> tuple[int, dict[str, SplitStatistics]]:
        """Number of duplicates, and the statistics of each split."""
        fraction = self._options.validation_fraction
        tasks = [ReduceTask(self._work, index, map_tasks, fraction) for index in range(self._partitions)]
        duplicates = 0
        statistics = {split: SplitStatistics() for split in SPLITS}
        for done, result in enumerate(self._pool.run(run_reduce, tasks), start=1):
            duplicates += result.duplicates
            for split in SPLITS:
                statistics[split].add(result.statistics[split])
            self._report("reduce", done, len(tasks))
        return duplicates, statistics

    def _check_not_empty(self, mapped: _MapTotals, statistics: dict[str, SplitStatistics]) -> None:
        if any(split.rows for split in statistics.values()):
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
            shards[task.split].append(shard)
            self._report("write", done, len(tasks))
        return shards

    def _write_tasks(self, split: str, rows: int) -> list[WriteTask]:
        count = max(1, math.ceil(rows / self._options.shard_rows))
        dataset = str(self.dataset)
        return [WriteTask(self._work, self._partitions, dataset, split, shard, count) for shard in range(count)]

    def _manifest(
        self,
        mapped: _MapTotals,
        duplicates: int,
        statistics: dict[str, SplitStatistics],
        shards: dict[str, list[ShardRecord]],
    ) -> Manifest:
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
        sources = zip(self._sources, mapped.rows, strict=True)
        files = [*write_dataset_dict(self.dataset, shards), SCAFFOLDS_FILE, REJECTS_FILE]
        return Manifest(
            versions={"rdkit": rdkit.__version__, "pyarrow": pa.__version__},
            options=dataclasses.asdict(self._options),
            sources=[SourceRecord.of(source, rows) for source, rows in sources],
            counts=counts,
            splits={split: _split_record(statistics[split], shards[split]) for split in SPLITS},
            files=[FileRecord.of(self.dataset, file) for file in files],
        )


def _partition_count(sources: list[Source]) -> int:
    """So many partitions that one fits in memory, by the size of the sources."""
    text = sum(s.bytes * _GZIP_RATIO if s.path.lower().endswith(".gz") else s.bytes for s in sources)
    return max(1, math.ceil(text / PARTITION_BYTES))


def _split_record(statistics: SplitStatistics, shards: list[ShardRecord]) -> SplitRecord:
    return SplitRecord(
        rows=statistics.rows,
        atoms=statistics.atoms,
        bonds=statistics.bonds,
        max_atoms=statistics.max_atoms,
        max_bonds=statistics.max_bonds,
        scaffolds=statistics.scaffolds,
        acyclic=statistics.acyclic,
        complexity_percentiles=statistics.complexity_percentiles(),
        shards=shards,
    )
