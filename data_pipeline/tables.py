"""The text formats: .smi, .csv and .tsv, plain or gzipped, as a stream of (SMILES text, id) records.

What cannot be understood is passed on as it is, so that every row of a file becomes a molecule or a reject:
a row without SMILES as '', bytes that are not UTF-8 as lone surrogates, a NUL as a character no SMILES has.
"""

import csv
import gzip
import io
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

from data_pipeline.errors import PipelineError, UsageError

SMILES_HEADERS = ("smiles", "canonical_smiles", "isomeric_smiles", "mol")
ID_HEADERS = ("id", "source_id", "name", "zinc_id", "chembl_id", "cid", "idnumber", "mol_id", "molecule_id")

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_EXTENSIONS = (".smi", ".txt", *_DELIMITERS)

# What follows in a longer line is dropped; a SMILES of that length would be rejected anyway.
_MAX_LINE_LENGTH = 1 << 20
# The csv module's own limit, 128 KiB, would refuse rows that carry a mol block beside the SMILES.
_MAX_FIELD_LENGTH = _MAX_LINE_LENGTH

# The byte order marks of UTF-16, as they come out of the UTF-8 decoder.
_UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")

Record = tuple[str, str | None]


@contextmanager
def open_records(path: str, smiles_column: str | None, id_column: str | None) -> Iterator[Iterator[Record]]:
    """Open a file and read its header; gives an iterator over its (SMILES text, id or None) records.

    Columns are header names. Without `smiles_column` the first header in `SMILES_HEADERS` is taken, without
    `id_column` the first in `ID_HEADERS` (.smi: the token beside the SMILES), in upper or lower case.

    Raises:
        UsageError: unknown extension, unknown column, no such file.
        PipelineError: not readable as what its name says; while iterating, too.
    """
    extension = _extension(path)
    with _open_text(path) as handle:
        lines = _lines(path, handle)
        first = next(lines, "")
        if first.startswith(_UTF16_MARKS):
            raise PipelineError(f"{path}: the file is UTF-16, not UTF-8; convert it with `iconv -f UTF-16`")
        lines = chain([first] if first else [], lines)
        if extension in _DELIMITERS:
            yield _delimited_records(path, lines, _DELIMITERS[extension], smiles_column, id_column)
        else:
            yield _whitespace_records(path, lines, smiles_column, id_column)


def _extension(path: str) -> str:
    name = path.lower().removesuffix(".gz")
    for extension in _EXTENSIONS:
        if name.endswith(extension):
            return extension
    raise UsageError(f"{path}: unknown file type; expected {', '.join(_EXTENSIONS)} or one of them + .gz")


def _open_text(path: str) -> io.TextIOWrapper:
    open_file = gzip.open if path.lower().endswith(".gz") else open
    try:
        raw = open_file(path, "rb")
    except OSError as error:
        raise UsageError(f"{path}: cannot open the file: {error.strerror}") from error
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape")


def _lines(path: str, handle: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file, each at most `_MAX_LINE_LENGTH` long; an error of reading names the file."""
    try:
        while line := handle.readline(_MAX_LINE_LENGTH):
            rest = line
            while len(rest) == _MAX_LINE_LENGTH and not rest.endswith("\n"):
                rest = handle.readline(_MAX_LINE_LENGTH)
            # NUL: Python 3.10's csv module refuses it.
            yield line.replace("\0", "\ufffd")
    except EOFError as error:
        raise PipelineError(f"{path}: the gzip file is truncated; fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise PipelineError(f"{path}: not a readable gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise PipelineError(f"{path}: cannot read the file: {error.strerror}") from error


def _whitespace_records(
    path: str, lines: Iterator[str], smiles_column: str | None, id_column: str | None
) -> Iterator[Record]:
    """`SMILES [id]` lines. The first is a header if it starts with a known name or holds the one given."""
    first = next(lines, "")
    header = first.split()
    if header and (header[0].lower() in SMILES_HEADERS or smiles_column in header):
        smiles = _smiles_index(path, header, smiles_column)
        beside = 1 if smiles == 0 else 0
        return _records(map(str.split, lines), smiles, _id_index(path, header, id_column, default=beside))
    for column in (smiles_column, id_column):
        if column is not None:
            raise UsageError(f"{path}: no column {column!r}: the file has no header line")
    return _records(map(str.split, chain([first] if first else [], lines)), 0, 1)


def _delimited_records(
    path: str, lines: Iterator[str], delimiter: str, smiles_column: str | None, id_column: str | None
) -> Iterator[Record]:
    rows = _csv_rows(lines, delimiter)
    header = [name.strip() for name in next(rows, [])]
    if not header:
        raise PipelineError(f"{path}: the first line is empty; expected the names of the columns")
    smiles = _smiles_index(path, header, smiles_column)
    return _records(rows, smiles, _id_index(path, header, id_column, default=_find(header, ID_HEADERS)))


def _records(rows: Iterator[list[str]], smiles: int, record_id: int | None) -> Iterator[Record]:
    for row in rows:
        text = row[smiles].strip() if smiles < len(row) else ""
        yield text, row[record_id].strip() if record_id is not None and record_id < len(row) else None


def _csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """The rows of a CSV file.

    A quote that is opened and never closed swallows the lines after it. Parsing is strict, so that this is
    noticed; the first of the lines is then read leniently by itself, and parsing resumes with the second: no
    row is lost.
    """
    # Global to the process, and only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD_LENGTH))
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


def _smiles_index(path: str, header: Sequence[str], column: str | None) -> int:
    if column is not None:
        return _named_index(path, header, column)
    index = _find(header, SMILES_HEADERS)
    if index is None:
        raise UsageError(f"{path}: no SMILES column among {_listed(header)}; name it with --smiles-column")
    return index


def _id_index(path: str, header: Sequence[str], column: str | None, default: int | None) -> int | None:
    return default if column is None else _named_index(path, header, column)


def _named_index(path: str, header: Sequence[str], column: str) -> int:
    if column not in header:
        raise UsageError(f"{path}: no column {column!r}; the file's columns are {_listed(header)}")
    return header.index(column)


def _find(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Index of the first column with one of the lower-case `names`."""
    return next((index for index, name in enumerate(header) if name.lower() in names), None)


def _listed(header: Sequence[str]) -> str:
    return ", ".join(ascii(name[:40]) for name in header[:20])
