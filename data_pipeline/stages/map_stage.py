"""Map: a chunk of source rows -> molecules, partitioned, in one file; and the rejects in another."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipeline.execution.task import Task, work_file
from data_pipeline.execution.watch import Watch
from data_pipeline.keys import is_first
from data_pipeline.molecules.encode import EncodedRows, encode_rows, reject_batch
from data_pipeline.schema import REJECT_SCHEMA
from data_pipeline.stages.partitions import MAPPED_SCHEMA, mol_key_words, partition_of, write_batches, write_partitions
from data_pipeline.stages.read_stage import chunk_file, read_chunk


@dataclass(frozen=True)
class MapResult:
    """What became of the rows of a chunk.

    duplicates: of molecules of the same chunk, which are left out already; standardized: rows whose molecule
    standardisation changed; partition_rows, partition_atoms: int64 [partitions], of the molecules kept.
    """

    rows: int
    rejected: Counter[str]
    duplicates: int
    standardized: int
    partition_rows: np.ndarray
    partition_atoms: np.ndarray


@dataclass(frozen=True)
class MapTask(Task[MapResult]):
    """Encode chunk `chunk`, which begins at row `first_row`, of the source `name` that the task `read_key` has read."""

    work: str
    read_key: str
    name: str
    chunk: int
    first_row: int
    partitions: int
    max_atoms: int
    standardize: bool
    molecule_seconds: float

    def __str__(self) -> str:
        return f"{self.name}, rows from {self.first_row}"

    @property
    def identity(self) -> tuple[object, ...]:
        options = (self.partitions, self.max_atoms, self.standardize, self.molecule_seconds)
        return (self.read_key, self.chunk, self.name, *options)

    @property
    def mapped_file(self) -> str:
        """The molecules, with `MAPPED_SCHEMA` (`write_partitions`)."""
        return work_file(self.work, "mapped", self.key)

    @property
    def rejects_file(self) -> str:
        """The other rows: one record batch, with `REJECT_SCHEMA`."""
        return work_file(self.work, "rejects", self.key)

    def outputs(self, result: MapResult) -> list[str]:
        return [self.mapped_file, self.rejects_file]

    def run(self, watch: Watch) -> MapResult:
        """Encode the chunk."""
        chunk = read_chunk(chunk_file(self.work, self.read_key, self.chunk), self.first_row)
        watch.begin(self.molecule_seconds)
        encoded = encode_rows(chunk.texts, chunk.ids, self.max_atoms, self.standardize, watch)
        rows = _distinct(encoded)
        partition = partition_of(rows, self.partitions)
        write_partitions(self.mapped_file, rows, partition, self.partitions)
        rejects = reject_batch(self.name, self.first_row, encoded.rejects)
        write_batches(self.rejects_file, REJECT_SCHEMA, [rejects])
        return MapResult(
            rows=len(chunk.texts),
            rejected=Counter(reject.reason for reject in encoded.rejects),
            duplicates=len(encoded.kept) - rows.num_rows,
            standardized=encoded.standardized,
            partition_rows=np.bincount(partition, minlength=self.partitions),
            partition_atoms=np.bincount(partition, rows.column("num_atoms").to_numpy(), self.partitions).astype(
                np.int64
            ),
        )


def _distinct(encoded: EncodedRows) -> pa.RecordBatch:
    """The molecules with `MAPPED_SCHEMA`, in the order of reading; of equal ones the first.

    So a million copies of one molecule do not meet in one partition.
    """
    smiles = pa.array(encoded.scaffold_smiles, pa.string())
    rows = pa.RecordBatch.from_arrays([*encoded.batch.columns, smiles], schema=MAPPED_SCHEMA)
    high, low = mol_key_words(rows.column("mol_key"))
    order = np.lexsort((low, high))
    first = np.sort(order[is_first(high[order], low[order])])
    return rows if len(first) == rows.num_rows else rows.take(pa.array(first))
