"""A Parquet file written piece by piece, whose bytes do not depend on how its rows were cut into pieces."""

from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.durable import flush

# Of a row group. To write one takes five times its bytes of memory, so where rows are wide they end it first.
_GROUP_ROWS = 1 << 16
_GROUP_BYTES = 128 << 20


class ParquetSink:
    """Collects batches and writes row groups of bounded size. Use it in a `with` statement.

    A row group ends before the row with which it would have too many rows or bytes, so where it ends follows from the
    rows alone.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._pending: list[pa.RecordBatch] = []
        self._rows = 0
        self._bytes = 0

    def __enter__(self) -> "ParquetSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_group()
        self._writer.close()
        if kind is None:
            flush(self._path)  # it is part of a dataset, which appears as a whole or not at all

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows at the end of the file."""
        end_n = np.cumsum(_bytes_of_rows(batch))
        first, done = 0, 0
        while first < batch.num_rows:
            fitting = int(np.searchsorted(end_n, done + _GROUP_BYTES - self._bytes, side="right"))
            last = min(fitting, first + _GROUP_ROWS - self._rows)
            if last <= first and self._rows:
                self._end_group()
                continue
            last = max(last, first + 1)  # a row that is larger than a row group has one for itself
            self._pending.append(batch.slice(first, last - first))
            self._rows += last - first
            self._bytes += int(end_n[last - 1]) - done
            first, done = last, int(end_n[last - 1])

    def _end_group(self) -> None:
        """Write the pending rows as a row group."""
        if not self._rows:
            return
        table = pa.Table.from_batches(self._pending, self._schema).combine_chunks()
        self._pending, self._rows, self._bytes = [], 0, 0
        self._writer.write_table(table, row_group_size=_GROUP_ROWS)


def _bytes_of_rows(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Bytes of the values of each row."""
    total_n = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        total_n += _bytes_of_values(column)
    return total_n


def _bytes_of_values(column: pa.Array) -> NDArray[np.int64] | int:
    kind = column.type
    if pa.types.is_string(kind):
        lengths, width = pc.binary_length(column), 1
    elif pa.types.is_list(kind):
        lengths, width = pc.list_value_length(column), _width(kind.value_type)
    else:
        return _width(kind)
    found: NDArray[np.int64] = pc.fill_null(lengths, 0).to_numpy().astype(np.int64) * width
    return found


def _width(kind: pa.DataType) -> int:
    """Bytes of a value of a type whose values have all the same size."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _width(kind.value_type)
    return kind.bit_width // 8
