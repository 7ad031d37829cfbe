"""The texts of a table encoded in a child process: one that hangs or crashes RDKit is rejected, and Ctrl-C works.

For tables that are held in memory as a whole; `hmoe prepare` and `hmoe embed` have tasks of their own, of sources.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipeline.execution.supervise import supervised
from data_pipeline.execution.task import Task, work_file
from data_pipeline.execution.watch import Watch
from data_pipeline.molecules.encode import Reject, encode_rows
from data_pipeline.options import DEFAULT_MOLECULE_SECONDS
from data_pipeline.schema import MOLECULE_SCHEMA
from data_pipeline.sources.source import DEFAULT_CHUNK_ROWS, SourceChunk
from data_pipeline.stages.partitions import concatenate, read_batch, write_batches
from data_pipeline.stages.read_stage import chunk_file, read_chunk, write_chunk

# In the names of files: of the one table that a work folder is of.
_READ_KEY = "table"


@dataclass(frozen=True)
class EncodedTexts:
    """What became of a list of texts.

    batch: the molecules, with `schema.MOLECULE_SCHEMA`; kept: int64 [molecules], the index of each molecule's text,
    ascending; rejects: the other texts, ascending by index.
    """

    batch: pa.RecordBatch
    kept: np.ndarray
    rejects: list[Reject]


def encode_supervised(name: str, texts: Sequence[str], standardize: bool) -> EncodedTexts:
    """Encode `texts` as `encode.encode_rows` does, a chunk after the other.

    A text that takes more than `DEFAULT_MOLECULE_SECONDS` of CPU time is rejected. name: of what they are from, for
    messages; standardize: encode the standard form of each molecule.

    Raises:
        PipelineError: the child process dies without a text being to blame.
    """
    batches: list[pa.RecordBatch] = []
    rejects: list[Reject] = []
    with tempfile.TemporaryDirectory(prefix="hmoe_encode_") as work:
        for chunk, first_row in enumerate(range(0, len(texts), DEFAULT_CHUNK_ROWS)):
            part = list(texts[first_row : first_row + DEFAULT_CHUNK_ROWS])
            write_chunk(chunk_file(work, _READ_KEY, chunk), SourceChunk(first_row, part, [""] * len(part)))
            task = EncodeTask(work, name, chunk, first_row, standardize, DEFAULT_MOLECULE_SECONDS)
            rejected = supervised(task)
            rejects += [dataclasses.replace(reject, index=first_row + reject.index) for reject in rejected]
            batches.append(read_batch(task.molecules_file, 0))
    kept = np.setdiff1d(np.arange(len(texts)), [reject.index for reject in rejects])
    return EncodedTexts(concatenate(batches, MOLECULE_SCHEMA), kept, rejects)


@dataclass(frozen=True)
class EncodeTask(Task[list[Reject]]):
    """Encode chunk `chunk`, which begins at row `first_row` of the table `name`. The result: the rejects."""

    work: str
    name: str
    chunk: int
    first_row: int
    standardize: bool
    molecule_seconds: float

    def __str__(self) -> str:
        return f"{self.name}, rows from {self.first_row}"

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.chunk, self.standardize, self.molecule_seconds)

    @property
    def molecules_file(self) -> str:
        return work_file(self.work, "molecules", self.key)

    def outputs(self, result: list[Reject]) -> list[str]:
        return [self.molecules_file]

    def run(self, watch: Watch) -> list[Reject]:
        texts = read_chunk(chunk_file(self.work, _READ_KEY, self.chunk), self.first_row)
        watch.begin(self.molecule_seconds)
        encoded = encode_rows(texts.texts, texts.ids, standardize=self.standardize, watch=watch)
        write_batches(self.molecules_file, MOLECULE_SCHEMA, [encoded.batch])
        return encoded.rejects
