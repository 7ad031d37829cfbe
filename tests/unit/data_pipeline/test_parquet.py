"""A Parquet file written piece by piece: the same bytes however it was cut, and bounded memory."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.stages import parquet
from data_pipeline.stages.parquet import ParquetSink

VECTOR = pa.list_(pa.float32(), 4)
SCHEMA = pa.schema([("name", pa.string()), ("atoms", pa.list_(VECTOR)), ("whole", VECTOR), ("number", pa.int32())])


def table(rows: int) -> pa.RecordBatch:
    """Rows of 8 * (row % 3) + 16 * (row % 5) + 20 bytes, some of them without a name."""
    columns = [
        pa.array([None if row % 3 == 0 else "12345678" * (row % 3) for row in range(rows)], pa.string()),
        pa.array([[[row] * 4] * (row % 5) for row in range(rows)], pa.list_(VECTOR)),
        pa.array([[row] * 4 for row in range(rows)], VECTOR),
        pa.array(range(rows), pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def size(row: int) -> int:
    return 8 * (row % 3) + 16 * (row % 5) + 20


def written(path: Path, rows: pa.RecordBatch, cuts: list[int]) -> bytes:
    with ParquetSink(path, rows.schema) as sink:
        for start, end in itertools.pairwise([0, *cuts, rows.num_rows]):
            sink.append(rows.slice(start, end - start))
    return path.read_bytes()


def group_rows(path: Path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


def expected_groups(rows: int, most_rows: int, most_bytes: int) -> list[int]:
    groups, used = [0], 0
    for row in range(rows):
        if groups[-1] and (groups[-1] == most_rows or used + size(row) > most_bytes):
            groups, used = [*groups, 0], 0
        groups[-1] += 1
        used += size(row)
    return groups


@pytest.mark.parametrize(("most_rows", "most_bytes"), [(50, 10**9), (10**9, 1000), (20, 1000), (10**9, 60), (10**9, 1)])
def test_row_groups_are_bounded_and_follow_from_the_rows_alone(most_rows, most_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr(parquet, "_GROUP_ROWS", most_rows)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", most_bytes)
    rows, chosen = table(333), np.random.default_rng(0)
    whole = written(tmp_path / "whole", rows, [])
    assert pq.read_table(tmp_path / "whole").equals(pa.Table.from_batches([rows]))
    assert group_rows(tmp_path / "whole") == expected_groups(333, most_rows, most_bytes)
    for cuts in ([1, 2, 3], [100], [50, 50, 150], *(sorted(chosen.integers(0, 333, 9).tolist()) for _ in range(5))):
        assert written(tmp_path / "cut", rows, cuts) == whole


def test_files_of_narrow_rows_have_the_row_groups_of_arrow(tmp_path):
    rows = table(150_000)
    found = written(tmp_path / "found", rows, [1000, 66_000, 70_000])
    with pq.ParquetWriter(tmp_path / "expected", SCHEMA, compression="zstd") as writer:
        writer.write_table(pa.Table.from_batches([rows]), row_group_size=1 << 16)
    assert found == (tmp_path / "expected").read_bytes()
    assert group_rows(tmp_path / "found") == [65536, 65536, 18928]


def test_what_is_held_is_bounded_by_bytes(monkeypatch, tmp_path):
    """Of rows wide as those of atoms, in pieces of 1 MiB; the memory that Arrow has is counted after each piece."""
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 4 << 20)
    chosen, before = np.random.default_rng(0), pa.total_allocated_bytes()
    with ParquetSink(tmp_path / "x", pa.schema([("atoms", pa.list_(pa.float32()))])) as sink:
        for _ in range(60):
            values = pa.array(chosen.standard_normal(1 << 18, np.float32))  # NumPy's memory
            values = pa.concat_arrays([values[:1], values[1:]])  # a copy, which is Arrow's
            atoms = pa.ListArray.from_arrays(pa.array(range(0, (1 << 18) + 1, 1 << 13), pa.int32()), values)
            sink.append(pa.RecordBatch.from_arrays([atoms], names=["atoms"]))
            del values, atoms
            assert pa.total_allocated_bytes() - before < 24 << 20
    assert len(group_rows(tmp_path / "x")) == 15
