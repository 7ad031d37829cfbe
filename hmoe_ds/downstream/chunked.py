"""Work on every molecule of a source, chunk by chunk, in worker processes; what a killed run has done is taken over.

Each worker is one core, and a chunk always has the same rows, so what is written does not depend on how many there are.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from data_pipeline.durable import atomically
from data_pipeline.errors import PipelineError
from data_pipeline.execution.executor import Resources, open_executor
from data_pipeline.execution.task import Task, work_file
from data_pipeline.execution.watch import Watch
from data_pipeline.molecules.encode import EncodedRows, encode_rows, reject_batch
from data_pipeline.molecules.rejects import rejects_in_words
from data_pipeline.options import DEFAULT_MAX_ATOMS, DEFAULT_MOLECULE_SECONDS
from data_pipeline.output import WorkFolder, work_folder
from data_pipeline.schema import REJECT_SCHEMA
from data_pipeline.sources.source import Source, SourceChunk, check_columns, resolve_sources
from data_pipeline.stages.partitions import read_batch, write_batches
from data_pipeline.stages.read_stage import ReadTask, chunk_file, read_chunk
from hmoe_ds.downstream.out_files import check_places, check_rejects, check_sources

CHUNK_ROWS = 4096

Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class RowOptions:
    """How rows of a source become molecules.

    Args:
        smiles_column: column with SMILES, in files with a header; found by itself without it.
        id_column: column with identifiers, in files with a header.
        format: of the files, one of `formats.FORMATS`; each tells its own without it.
        max_atoms: larger molecules are rejected.
        molecule_seconds: CPU time of RDKit after which a molecule is rejected.
    """

    smiles_column: str | None = None
    id_column: str | None = None
    format: str | None = None
    max_atoms: int = DEFAULT_MAX_ATOMS
    molecule_seconds: float = DEFAULT_MOLECULE_SECONDS


@dataclass(frozen=True)
class ChunkTask(Task[Counter[str]]):
    """Work on chunk `chunk`, which begins at row `first_row`, of the source `name` that the task `read_key` has read.

    The result: `molecules`, and the rejects by reason.
    """

    work: str
    read_key: str
    name: str
    chunk: int
    first_row: int
    options: RowOptions

    def __str__(self) -> str:
        return f"{self.name}, rows from {self.first_row}"

    @property
    @abstractmethod
    def settings(self) -> tuple[object, ...]:
        """What, besides the rows, decides what is written: plain values."""

    @property
    @abstractmethod
    def standardize(self) -> bool:
        """Whether molecules are brought into their standard form."""

    @property
    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns that `results` gives."""

    @abstractmethod
    def results(self, chunk: SourceChunk, encoded: EncodedRows) -> pa.RecordBatch:
        """What is written of the chunk."""

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.read_key, self.chunk, self.name, *asdict(self.options).values(), *self.settings)

    @property
    def results_file(self) -> str:
        return work_file(self.work, "results", self.key)

    @property
    def rejects_file(self) -> str:
        return work_file(self.work, "rejects", self.key)

    def outputs(self, result: Counter[str]) -> list[str]:
        return [self.results_file, self.rejects_file]

    def run(self, watch: Watch) -> Counter[str]:
        chunk = read_chunk(chunk_file(self.work, self.read_key, self.chunk), self.first_row)
        watch.begin(self.options.molecule_seconds)
        encoded = encode_rows(chunk.texts, chunk.ids, self.options.max_atoms, self.standardize, watch)
        write_batches(self.results_file, self.schema, [self.results(chunk, encoded)])
        rejects = reject_batch(self.name, self.first_row, encoded.rejects)
        write_batches(self.rejects_file, REJECT_SCHEMA, [rejects])
        return Counter({"molecules": encoded.batch.num_rows}) + Counter(reject.reason for reject in encoded.rejects)


# Makes the task of a chunk: of the work folder, the key of the task that read it, the source's name, chunk, first row.
MakeTask = Callable[[str, str, str, int, int], ChunkTask]


@dataclass(frozen=True)
class Done:
    """What became of a source.

    Args:
        tasks: in the order of its rows; their files are there.
        counts: `molecules`, and the rejects by reason.
        folder: where these files are, and what is written of them until it is whole.
    """

    tasks: list[ChunkTask]
    counts: Counter[str]
    folder: Path

    @property
    def molecules(self) -> int:
        return self.counts["molecules"]

    @property
    def rejected(self) -> int:
        return self.counts.total() - self.molecules

    @property
    def reasons(self) -> dict[str, int]:
        """Rejects by reason, the most common first."""
        return {reason: count for reason, count in self.counts.most_common() if reason != "molecules"}

    def check(self, source: str, reasons: Path) -> None:
        """Raise PipelineError if no row of the source is a molecule; the file `reasons` says why."""
        if not self.molecules:
            counts = rejects_in_words(self.reasons) or "it has no rows"
            raise PipelineError(f"{source} holds no readable molecule: see {reasons}: {counts}")

    def write(self, out: Path) -> AbstractContextManager[str]:
        """Gives a temporary path. What was written there gets the name `out` if all went well.

        It is in the folder, so what a kill leaves there goes with it.
        """
        return atomically(out, self.folder / f"out-{out.name}")

    def results(self) -> Iterator[pa.RecordBatch]:
        """What was written of each chunk."""
        return (read_batch(task.results_file, 0) for task in self.tasks)

    def rejects(self) -> Iterator[pa.RecordBatch]:
        """The rejects of each chunk, with `schema.REJECT_SCHEMA`."""
        return (read_batch(task.rejects_file, 0) for task in self.tasks)


@contextmanager
def done_by_chunks(
    source: str,
    outs: Sequence[Path],
    model: str,
    options: RowOptions,
    workers: int,
    stage: str,
    make_task: MakeTask,
    report: Report,
) -> Iterator[Done]:
    """Work on all rows of `source`. The results lie in a folder beside `outs`, which goes when the context ends well.

    Args:
        source: what `hmoe prepare` reads.
        outs: files that are to be written of the results, in the context; the first one names the folder, another one
            is of rejects.
        model: folder of what does the work, in which nothing may be written.
        options: how rows become molecules.
        workers: processes, one core each.
        stage: what the work is called.
        make_task: makes the task of a chunk.
        report: called with (stage, units done, all units).

    Raises:
        UsageError: no such source or column; one of `outs` is a folder, the source, or in the model's folder, or would
            replace something else than rejects; another command writes the same file.
        PipelineError: the source is damaged or out of reach.
    """
    check_places(outs, model)
    sources = resolve_sources([source], options.format)
    for entry in sources:
        check_columns(entry, options.smiles_column, options.id_column)
    check_sources(outs, sources)
    check_rejects(outs)
    out = outs[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + ".work").absolute()
    with work_folder(work) as folder:
        tasks = list(_read(sources, options, folder, make_task, report))
        counts = _do(tasks, min(workers, max(len(tasks), 1)), folder, stage, report)
        yield Done(tasks, counts, folder.path)
    with suppress(OSError):  # not empty
        work.rmdir()


def _read(
    sources: list[Source], options: RowOptions, folder: WorkFolder, make_task: MakeTask, report: Report
) -> Iterator[ChunkTask]:
    work = str(folder.path)
    reads = [ReadTask(work, source, options.smiles_column, options.id_column, CHUNK_ROWS) for source in sources]
    with open_executor(Resources(), work) as executor:
        for number, (read, rows) in enumerate(zip(reads, executor.run(reads), strict=True), start=1):
            report("read", number, len(reads))
            first_row = 0
            for chunk, count in enumerate(rows):
                yield make_task(work, read.key, read.source.name, chunk, first_row)
                first_row += count


def _do(tasks: list[ChunkTask], workers: int, folder: WorkFolder, stage: str, report: Report) -> Counter[str]:
    counts: Counter[str] = Counter()
    with open_executor(Resources(workers), str(folder.path)) as executor:
        for result in executor.run(tasks):
            counts += result
            folder.keep = True
            report(stage, counts.total(), None)
    return counts
