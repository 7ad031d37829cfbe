"""Map: a chunk of source rows -> molecules, partitioned, in one file; and the rejects."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipeline.encode import Reject, encode_rows
from data_pipeline.partitions import MAPPED_SCHEMA, write_partitions
from data_pipeline.sources import SourceChunk


@dataclass(frozen=True)
class MapTask:
    """Encode `chunk` into the file `path`, in `partitions` partitions."""

    chunk: SourceChunk
    path: str
    partitions: int
    max_atoms: int
    standardize: bool

    def __str__(self) -> str:
        chunk = self.chunk
        return f"rows {chunk.first_row}-{chunk.first_row + len(chunk.texts) - 1} of source {chunk.source_index + 1}"


@dataclass(frozen=True)
class MapResult:
    """Row `first_row + reject.index` of the source is a reject; all other rows of the chunk are molecules.

    `standardized` of the molecules were changed by standardisation.
    """

    source_index: int
    first_row: int
    rows: int
    rejects: list[Reject]
    standardized: int


def run_map(task: MapTask) -> MapResult:
    """Do a map task. The same task always writes the same bytes."""
    chunk = task.chunk
    encoded = encode_rows(chunk.texts, chunk.ids, task.max_atoms, task.standardize)
    added = {
        "scaffold_smiles": pa.array(encoded.scaffold_smiles, pa.string()),
        "source_index": pa.array(np.full(len(encoded.kept), chunk.source_index, dtype=np.int32)),
        "row": pa.array(chunk.first_row + encoded.kept),
    }
    rows = pa.RecordBatch.from_arrays([*encoded.batch.columns, *added.values()], schema=MAPPED_SCHEMA)
    write_partitions(task.path, rows, task.partitions)
    return MapResult(chunk.source_index, chunk.first_row, len(chunk.texts), encoded.rejects, encoded.standardized)
