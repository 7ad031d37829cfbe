"""Read: a source -> chunks of its rows in files, so that every later task can begin anywhere in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from data_pipeline.errors import PipelineError
from data_pipeline.execution.task import Task, work_file
from data_pipeline.execution.watch import Watch
from data_pipeline.keys import file_checksum
from data_pipeline.remote import is_url, stamp
from data_pipeline.sources.formats import SYNTH
from data_pipeline.sources.source import Source, SourceChunk, read_chunks
from data_pipeline.stages.partitions import read_batch, write_batches

# Bytes, not strings: what is not UTF-8 in a source is kept as it is, to be rejected with the row's other faults.
_TEXT_SCHEMA = pa.schema([("text", pa.large_binary()), ("id", pa.large_binary())])


@dataclass(frozen=True)
class ReadTask(Task[list[int]]):
    """Cut a source into chunks of `chunk_rows` rows. The result: the rows of each chunk."""

    work: str
    source: Source
    smiles_column: str | None
    id_column: str | None
    chunk_rows: int

    def __str__(self) -> str:
        return f"reading {self.source.name}"

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.source.blake2b, self.source.format, self.smiles_column, self.id_column, self.chunk_rows)

    def outputs(self, result: list[int]) -> list[str]:
        return [chunk_file(self.work, self.key, number) for number in range(len(result))]

    def run(self, watch: Watch) -> list[int]:
        """Read the source.

        Raises:
            UsageError, PipelineError: as `sources.read_chunks`; the source has changed since its checksum was taken.
        """
        rows = []
        for number, chunk in enumerate(read_chunks(self.source, self.smiles_column, self.id_column, self.chunk_rows)):
            write_chunk(chunk_file(self.work, self.key, number), chunk)
            rows.append(len(chunk.texts))
        self._check_unchanged()
        return rows

    def _check_unchanged(self) -> None:
        """The rows are those of the checksum, which names all that is made of them: read here, perhaps elsewhere."""
        path, expected = self.source.path, self.source.blake2b
        if is_url(path):
            # To read it once more would cost as much as all the rest.
            unchanged = stamp(path) == self.source.stamp
        else:
            unchanged = self.source.format == SYNTH or file_checksum(path) == expected
        if unchanged:
            return
        raise PipelineError(
            f"{path}: changed while it was read, or is another file on another machine; run again when it is complete"
        )


def chunk_file(work: str, read_key: str, number: int) -> str:
    """The file of a chunk."""
    return work_file(work, "text", f"{read_key}-{number:06d}")


def read_chunk(path: str, first_row: int) -> SourceChunk:
    """The chunk in a file, which begins at row `first_row` of its source."""
    texts, ids = (
        [value.decode("utf-8", "surrogateescape") for value in column.to_pylist()] for column in read_batch(path, 0)
    )
    return SourceChunk(first_row, texts, ids)


def write_chunk(path: str, chunk: SourceChunk) -> None:
    """Write a chunk, which is there as a whole or not at all."""
    columns = [_binary(chunk.texts), _binary(chunk.ids)]
    write_batches(path, _TEXT_SCHEMA, [pa.RecordBatch.from_arrays(columns, schema=_TEXT_SCHEMA)])


def _binary(texts: Sequence[str]) -> pa.Array:
    return pa.array([text.encode("utf-8", "surrogateescape") for text in texts], pa.large_binary())
