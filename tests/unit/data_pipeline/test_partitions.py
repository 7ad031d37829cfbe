"""The files between the stages give back what was written, in whatever batches."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.schema import SPLITS
from data_pipeline.stages.partitions import batches_for, partition_of, read_partition, write_partitions
from data_pipeline.stages.reduce_stage import REDUCED_SCHEMA, read_reduced, write_reduced

KEYS = pa.schema([("scaffold_key", pa.uint64()), ("mol_key", pa.binary(16)), ("number", pa.int64())])


def keys(count: int, seed: int) -> pa.RecordBatch:
    """Random keys; every fifth molecule is acyclic."""
    generator = np.random.default_rng(seed)
    scaffolds = generator.integers(1, 2**64, count, dtype=np.uint64)
    scaffolds[::5] = 0
    mol_keys = [generator.bytes(16) for _ in range(count)]
    columns = [pa.array(scaffolds), pa.array(mol_keys, pa.binary(16)), pa.array(np.arange(count))]
    return pa.RecordBatch.from_arrays(columns, schema=KEYS)


@pytest.mark.parametrize("counts", [(0,), (1, 700), (5000, 3, 513)])
@pytest.mark.parametrize("partitions", [1, 8, 64])
def test_partitions(counts: tuple[int, ...], partitions: int, tmp_path) -> None:
    files = [keys(count, seed) for seed, count in enumerate(counts)]
    paths = [str(tmp_path / str(number)) for number in range(len(files))]
    for path, rows in zip(paths, files, strict=True):
        write_partitions(path, rows, partition_of(rows, partitions), partitions)
    for index in range(partitions):
        expected = [row for rows in files for row in rows.to_pylist() if range_of(row, partitions) == index]
        read = [row for batch in read_partition(paths, index, partitions) for row in batch.to_pylist()]
        assert read == expected


def range_of(row: dict, partitions: int) -> int:
    key = row["scaffold_key"] or int.from_bytes(row["mol_key"][:8], "big")
    return key * partitions >> 64


def test_batches_are_few_and_of_some_hundred_rows() -> None:
    assert [batches_for(rows, 64) for rows in (0, 1, 511, 512, 1023, 1024, 5000, 10**6)] == [1, 1, 1, 1, 1, 2, 8, 64]


@pytest.mark.parametrize("counts", [(0, 0), (3000, 20), (700, 5000)])
def test_reduced_files(counts: tuple[int, int], tmp_path) -> None:
    generator = np.random.default_rng(1)
    splits = []
    for count in counts:
        hashes = np.sort(generator.integers(0, 2**64, count, dtype=np.uint64))
        columns = {field.name: pa.nulls(count, field.type) for field in REDUCED_SCHEMA}
        columns["run_hash"] = pa.array(hashes)
        splits.append(pa.RecordBatch.from_arrays(list(columns.values()), schema=REDUCED_SCHEMA))
    write_reduced(str(tmp_path / "file"), splits)
    bounds = [0, 1, 2**50, 2**61 + 7, 2**63, 2**63 + 1, 2**64 - 1, 2**64]
    for split, rows in zip(SPLITS, splits, strict=True):
        hashes = rows.column("run_hash").to_pylist()
        for low, high in pairwise(bounds):
            pieces = read_reduced(str(tmp_path / "file"), split, low, high)
            assert [h for piece in pieces for h in piece.column("run_hash").to_pylist()] == [
                h for h in hashes if low <= h < high
            ]
