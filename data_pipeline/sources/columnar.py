"""Parquet and Arrow IPC (file and stream), a batch at a time: as records, from two columns, or as rows of a table."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.remote import is_url, one_line
from data_pipeline.sources.columns import ID_HEADERS, Record, find, id_index, structure_index, structure_text
from data_pipeline.sources.lines import MAX_LINE_LENGTH, decoded
from data_pipeline.sources.streams import REQUEST_BYTES, open_random_access

PARQUET_MAGIC = b"PAR1"
ARROW_MAGIC = b"ARROW1"
# A stream begins with the length of its schema message after this mark.
ARROW_STREAM_MAGIC = b"\xff\xff\xff\xff"
# Version 1 of Feather, which was no Arrow IPC.
_FEATHER_V1_MAGIC = b"FEA1"
# A message of no length, which writers of streams end with since 2019.
_ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

# Few, as a cell may have 1 MiB; with fewer, reading gets slow.
_BATCH_ROWS = 64
# A dictionary, which may be long, is checked with each so many rows.
_CHECKED_ROWS = 1024

Kind = Literal["parquet", "arrow"]
# -> indices of the columns to read.
_Choose = Callable[[pa.Schema], list[int]]
# The names of columns, and batches that have them.
_Columns = tuple[list[str], Iterator[pa.RecordBatch]]


@contextmanager
def open_columnar(
    path: str, kind: Kind, smiles_column: str | None, id_column: str | None
) -> Iterator[Iterator[Record]]:
    """Records of a file, of any size of row groups in the same memory. An id of any scalar type becomes text.

    Raises:
        UsageError: no such file, no such column, a column of another type.
        PipelineError: the file is damaged; while iterating, too.
    """
    with _open(path, kind, lambda schema: _record_columns(path, schema, smiles_column, id_column)) as (_, rows):
        yield _records(rows)


@contextmanager
def open_columnar_table(path: str, kind: Kind) -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """The names of the columns that have one value in each row, and the rows, as text; a null is "".

    Raises as `open_columnar`.
    """
    with _open(path, kind, _scalar_columns) as (names, rows):
        yield names, ([text or "" for text in cells] for row in rows for cells in zip(*row, strict=True))


@contextmanager
def _open(path: str, kind: Kind, choose: _Choose) -> Iterator[tuple[list[str], Iterator[list[Iterator[str | None]]]]]:
    """-> the names of the columns that `choose` chooses, and the texts of each of them, some rows at a time."""
    opened = {"parquet": _open_parquet, "arrow": _open_arrow}[kind]
    with opened(path, choose) as (names, batches):
        yield names, _batch_texts(path, kind, batches, names)


@contextmanager
def _open_parquet(path: str, choose: _Choose) -> Iterator[_Columns]:
    with open_random_access(path) as source:
        with _naming(path, "parquet"):
            # Column chunks, which may be as large as the file, are streamed; by default they are read as a whole.
            file = pq.ParquetFile(source, buffer_size=REQUEST_BYTES, pre_buffer=False)
            schema = file.schema_arrow
        names = [schema.names[index] for index in choose(schema)]
        yield names, file.iter_batches(batch_size=_BATCH_ROWS, columns=names)


@contextmanager
def _open_arrow(path: str, choose: _Choose) -> Iterator[_Columns]:
    with open_random_access(path) as source:
        with _naming(path, "arrow"):
            _check_end(path, source)
            start = _stream_start(source)
            source.seek(start)
            schema = pa.ipc.open_stream(source).schema
        columns = choose(schema)
        source.seek(start)
        sequential = pa.BufferedInputStream(source, REQUEST_BYTES) if is_url(path) else source
        with _naming(path, "arrow"):
            batches = pa.ipc.open_stream(sequential, options=pa.ipc.IpcReadOptions(included_fields=columns))
        yield [schema.names[index] for index in columns], iter(batches)


def _stream_start(source: pa.NativeFile) -> int:
    """An IPC file is a stream behind its magic bytes, padded to eight."""
    source.seek(0)
    return 8 if source.read(len(ARROW_MAGIC)) == ARROW_MAGIC else 0


def _check_end(path: str, source: pa.NativeFile) -> None:
    """A truncated file might end between two batches, which Arrow takes for its end."""
    if source.read(len(_FEATHER_V1_MAGIC)) == _FEATHER_V1_MAGIC:
        raise UsageError(f"{path}: Feather version 1, expected 2; read it with pyarrow.feather and write it as Parquet")
    source.seek(max(0, source.size() - len(_ARROW_STREAM_END)))
    if not source.read().endswith((ARROW_MAGIC, _ARROW_STREAM_END)):
        raise PipelineError(f"{path}: the Arrow file is truncated: its end mark is missing; fetch it again")


def _record_columns(path: str, schema: pa.Schema, smiles_column: str | None, id_column: str | None) -> list[int]:
    """Indices of the structure's column and, where there is one, of the id's."""
    structure = structure_index(path, schema.names, smiles_column)
    record_id = id_index(path, schema.names, id_column, default=find(schema.names, ID_HEADERS))
    if not _is_text(schema.field(structure).type):
        name, dtype = schema.names[structure], schema.field(structure).type
        raise UsageError(f"{path}: column {name!r} holds {dtype}, expected text; name another with --smiles-column")
    if record_id is None:
        return [structure]
    if not _becomes_text(schema.field(record_id).type):
        name, dtype = schema.names[record_id], schema.field(record_id).type
        raise UsageError(f"{path}: column {name!r} holds {dtype}, expected one value; name another with --id-column")
    return [structure, record_id]


def _scalar_columns(schema: pa.Schema) -> list[int]:
    return [index for index, field in enumerate(schema) if _becomes_text(field.type)]


def _is_text(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        return _is_text(dtype.value_type)
    return pa.types.is_null(dtype) or _is_binary(dtype) or _is_string(dtype)


def _becomes_text(dtype: pa.DataType) -> bool:
    if pa.types.is_dictionary(dtype):
        return _becomes_text(dtype.value_type)
    if _is_text(dtype):
        return True
    try:
        pa.nulls(0, dtype).cast(pa.string())
    except pa.ArrowNotImplementedError:
        return False
    return True


def _is_string(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or pa.types.is_string_view(dtype)


def _is_binary(dtype: pa.DataType) -> bool:
    return (
        pa.types.is_binary(dtype)
        or pa.types.is_large_binary(dtype)
        or pa.types.is_fixed_size_binary(dtype)
        or pa.types.is_binary_view(dtype)
    )


def _records(rows: Iterator[list[Iterator[str | None]]]) -> Iterator[Record]:
    for structures, *ids in rows:
        for text, record_id in zip(structures, ids[0] if ids else repeat(None), strict=False):
            yield structure_text(text or ""), record_id


def _batch_texts(
    path: str, kind: Kind, batches: Iterator[pa.RecordBatch], names: Sequence[str]
) -> Iterator[list[Iterator[str | None]]]:
    with _naming(path, kind):
        for batch in batches:
            # Views of a batch that may be the whole file.
            for checked in _slices(batch, _CHECKED_ROWS):
                checked.validate(full=True)  # a damaged file must not crash the process
                for rows in _slices(checked, _BATCH_ROWS):
                    yield [_texts(rows.column(rows.schema.names.index(name))) for name in names]


def _slices(batch: pa.RecordBatch, length: int) -> Iterator[pa.RecordBatch]:
    return (batch.slice(first, length) for first in range(0, batch.num_rows, length))


def _texts(column: pa.Array) -> Iterator[str | None]:
    """The values of a column as text, cut as lines are, a null as None; bytes that are not UTF-8 as lone surrogates."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if getattr(column.type, "extension_name", "") == "arrow.uuid":
        column = pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    if not _is_text(column.type):
        column = column.cast(pa.string())
    cut = pc.binary_slice(column.cast(pa.large_binary()), 0, MAX_LINE_LENGTH)
    return (None if value is None else decoded(value) for value in cut.to_pylist())


@contextmanager
def _naming(path: str, kind: Kind) -> Iterator[None]:
    """Arrow's errors as ours, which name the file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        name = kind.capitalize()
        raise PipelineError(f"{path}: not a readable {name} file ({one_line(error)}); fetch it again") from error
