"""The files between map and reduce: molecules, cut into partitions by ranges of their keys.

A partition holds every molecule of its scaffolds, so the same molecule always meets itself there. An acyclic molecule
has no scaffold and goes by its own key.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.keys import range_of
from data_pipeline.scaffold import ACYCLIC_KEY
from data_pipeline.schema import MOLECULE_SCHEMA

# A molecule, and where it was read: source_index is the position of its source in the list of sources.
MAPPED_SCHEMA = (
    MOLECULE_SCHEMA.append(pa.field("scaffold_smiles", pa.string()))
    .append(pa.field("source_index", pa.int32()))
    .append(pa.field("row", pa.int64()))
)


def mapped_file(work: str, task: int) -> str:
    """The file a map task writes."""
    return str(Path(work) / f"mapped-{task:08d}.arrow")


def write_partitions(path: str, rows: pa.RecordBatch, partitions: int) -> None:
    """Write `rows`, which have both keys, as an Arrow file of one record batch per partition."""
    scaffold_keys = rows.column("scaffold_key").to_numpy()
    own_keys, _ = mol_key_words(rows.column("mol_key"))
    partition = range_of(np.where(scaffold_keys == ACYCLIC_KEY, own_keys, scaffold_keys), partitions)
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
        for index in range(partitions):
            writer.write_batch(rows.take(pa.array(np.flatnonzero(partition == index))))


def read_partition(paths: list[str], index: int, schema: pa.Schema) -> pa.RecordBatch:
    """The rows of one partition, from files that `write_partitions` wrote with `schema`."""
    batches = []
    for path in paths:
        with pa.OSFile(path) as source:
            batches.append(pa.ipc.open_file(source).get_batch(index))
    return concatenate(batches, schema)


def concatenate(batches: list[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """One record batch from several, or from none."""
    table = pa.Table.from_batches(batches, schema)
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=schema)


def mol_key_words(keys: pa.FixedSizeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of 128-bit keys as uint64 [n] each; ordered like the keys' bytes."""
    words = np.frombuffer(keys.buffers()[1], dtype=">u8").reshape(-1, 2)[keys.offset : keys.offset + len(keys)]
    return words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64)
