"""Text tables, .smi, .csv and .tsv, as a stream of records.

What cannot be understood is passed on as it is, so that every row of a file becomes a molecule or a reject:
a row without SMILES as '', bytes that are not UTF-8 as lone surrogates, a NUL as a character no SMILES has.
"""

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.sources.columns import (
    ID_HEADERS,
    SMILES_HEADERS,
    STRUCTURE_HEADERS,
    Record,
    find,
    format_of_header,
    id_index,
    structure_index,
    structure_text,
    without_extension,
)
from data_pipeline.sources.lines import MAX_LINE_LENGTH, read_lines
from data_pipeline.sources.streams import open_stream

_QUOTED = re.compile('"[^"]*"')
_SEPARATOR = re.compile('"?sep=([,;\t])"?', re.IGNORECASE)


@contextmanager
def open_smiles(
    path: str, smiles_column: str | None, id_column: str | None, id_first: bool = False
) -> Iterator[Iterator[Record]]:
    """Records of `SMILES [id] ...` lines, or of `id SMILES ...` lines when `id_first`.

    The first line is a header if it starts with a known name or holds the one given. Columns are separated by white
    space, or by tabs where the header is. The extension of a CXSMILES (enhanced stereo, atom labels) is dropped.

    Raises:
        UsageError: no such file, no such column.
        PipelineError: the file is damaged or UTF-16; while iterating, too.
    """
    with open_stream(path) as stream:
        lines = read_lines(path, stream)
        first = next(lines, None)
        if first is None:
            yield iter(())
            return
        separator = "\t" if "\t" in first else None
        header = [name.strip() for name in first.split(separator)]
        if _is_header(header, smiles_column):
            structure = structure_index(path, header, smiles_column)
            known = find(header, ID_HEADERS)
            beside = 1 if structure == 0 else 0
            record_id = id_index(path, header, id_column, default=beside if known is None else known)
            yield _records(_split(lines, separator), structure, record_id)
            return
        if format_of_header(first, smiles_column) == "csv":
            raise UsageError(f"{path}: its first line is the header of a csv file; name that format with --format csv")
        for column in (smiles_column, id_column):
            if column is not None:
                raise UsageError(f"{path}: no column {column!r}: the file has no header line")
        rows = _split(chain([first], lines), None)
        yield _records(rows, 1, 0) if id_first else _records(rows, 0, 1)


@contextmanager
def open_delimited(
    path: str, delimiter: str, smiles_column: str | None, id_column: str | None
) -> Iterator[Iterator[Record]]:
    """Records of a table with a header, whose cells may be quoted.

    Raises as `open_smiles`.
    """
    with open_table(path, delimiter) as (header, rows):
        structure = structure_index(path, header, smiles_column)
        yield _records(rows, structure, id_index(path, header, id_column, default=find(header, ID_HEADERS)))


@contextmanager
def open_table(path: str, delimiter: str = ",") -> Iterator[tuple[list[str], Iterator[list[str]]]]:
    """The names of a table's columns, and its rows as their cells, which may be quoted.

    What stands between them the first line tells, even if it is not `delimiter`, which the name of the file promises;
    or, as Excel has it, a line `sep=;` before that. An empty line is a row without cells.

    Raises:
        UsageError: no such file.
        PipelineError: the file is damaged or UTF-16, while iterating, too; it begins with an empty line.
    """
    with open_stream(path) as stream:
        lines = read_lines(path, stream)
        first = next(lines, "")
        told = _SEPARATOR.fullmatch(first)
        if told:
            first, delimiter = next(lines, ""), told[1]
        else:
            delimiter = _delimiter(_QUOTED.sub("", first), delimiter)
        rows = _csv_rows((line + "\n" for line in chain([first], lines)), delimiter)
        header = [name.strip() for name in next(rows)]
        if not header:
            raise PipelineError(f"{path}: the first line is empty; expected the names of the columns")
        yield header, rows


def _delimiter(header: str, expected: str) -> str:
    """What stands between the names of a header: tabs where they are expected, else what there is most of."""
    if expected == "\t" and "\t" in header:
        return expected
    return max(f"{expected},;\t", key=header.count)


def _is_header(header: list[str], smiles_column: str | None) -> bool:
    """True for a line that starts with the name of a structure, or of an id before one, or holds the name given."""
    if smiles_column in header:
        return True
    structures = (*SMILES_HEADERS, *STRUCTURE_HEADERS)
    if find(header[:1], ID_HEADERS) is not None:
        return find(header, structures) is not None
    return find(header[:1], structures) is not None


def _split(lines: Iterable[str], separator: str | None) -> Iterator[list[str]]:
    for line in lines:
        if separator is None and "|" in line:
            line = without_extension(line)  # which may have blanks; between tabs that is done in its cell alone
        yield line.split(separator)


def _records(rows: Iterator[list[str]], structure: int, record_id: int | None) -> Iterator[Record]:
    for row in rows:
        text = structure_text(row[structure]) if structure < len(row) else ""
        yield text, row[record_id].strip() if record_id is not None and record_id < len(row) else None


def _csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """The rows of a CSV file.

    A quote that is opened and never closed swallows the lines after it. Parsing is strict, so that this is
    noticed; the first of the lines is then read leniently by itself, and parsing resumes with the second: no
    row is lost.
    """
    # Global to the process, and only ever raised: its 128 KiB would refuse rows with a mol block beside the SMILES.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_LENGTH))
    again: deque[str] = deque()
    taken: list[str] = []

    def feed() -> Iterator[str]:
        while True:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                return
            taken.append(line)
            yield line

    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        taken.clear()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error:
            refused, *rest = taken
            again.extendleft(reversed(rest))
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
            yield next(csv.reader([refused], delimiter=delimiter))
