"""A Parquet file written piece by piece, whose bytes do not depend on how its rows were cut into pieces."""

from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

_ROW_GROUP = 1 << 16


class ParquetSink:
    """Collects batches and writes row groups of a fixed size. Use it in a `with` statement."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0

    def __enter__(self) -> "ParquetSink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush(self._pending_rows)
        self._writer.close()

    def append(self, batch: pa.RecordBatch) -> None:
        """Add rows at the end of the file."""
        self._pending.append(batch)
        self._pending_rows += batch.num_rows
        self._flush(self._pending_rows - self._pending_rows % _ROW_GROUP)

    def _flush(self, rows: int) -> None:
        """Write the first `rows` of the pending rows."""
        if rows == 0:
            return
        table = pa.Table.from_batches(self._pending, self._schema).combine_chunks()
        self._writer.write_table(table.slice(0, rows), row_group_size=_ROW_GROUP)
        self._pending = table.slice(rows).to_batches()
        self._pending_rows -= rows
