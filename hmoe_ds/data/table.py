"""A user's table of molecules: a CSV, Parquet, Arrow or SD file, its cells as text, its labels as numbers.

It is read as `hmoe prepare` reads it, so that a row is the same molecule for every command.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import UsageError
from data_pipeline.sources.columnar import open_columnar_table
from data_pipeline.sources.columns import ID_HEADERS, find, id_index, listed, structure_index, structure_text
from data_pipeline.sources.formats import HEAD_BYTES, binary_format, check_no_archive, is_sdf
from data_pipeline.sources.sdf import SdfTable, read_sdf_table
from data_pipeline.sources.streams import file_name, read_head
from data_pipeline.sources.tables import open_table

# What a cell without a label may say, in lower case.
MISSING = {"", "na", "n/a", "nan", "none", "null"}
# The booleans of pandas and Arrow.
_WORDS = dict.fromkeys(MISSING, math.nan) | {"false": 0.0, "true": 1.0}


@dataclass(frozen=True)
class Table:
    """The cells of a table.

    Args:
        path: where it was read, for messages.
        header: names of the columns.
        rows: cells of each row as they are written; a row may be shorter than the header.
        sdf: of an SDF, which has structures and ids beside its columns.
    """

    path: str
    header: list[str]
    rows: list[list[str]]
    sdf: SdfTable | None = None

    @classmethod
    def read(cls, path: str) -> Table:
        """The table at a path or URL: Parquet, Arrow, SDF, or text with commas, semicolons or tabs, perhaps compressed.

        An empty line of text is an empty row. Columns of Parquet and Arrow that hold lists or structs are left out. An
        SDF, which its extension tells, or its content where it has none, has its properties as columns.

        Raises:
            UsageError: no such file, an archive, a row with more cells than there are columns, no property in an SDF.
            PipelineError: it cannot be read, or has no header.
        """
        head = read_head(path, HEAD_BYTES)
        check_no_archive(path, head)
        binary = binary_format(head)
        if binary is None and is_sdf(file_name(path), head):
            sdf = read_sdf_table(path)
            return cls(path, sdf.header, sdf.rows, sdf)
        with open_table(path) if binary is None else open_columnar_table(path, binary) as (header, lines):
            rows = list(lines)
        for number, row in enumerate(rows, start=1):
            if any(cell.strip() for cell in row[len(header) :]):
                raise UsageError(
                    f"{path} has {len(row)} cells in row {number}, and {len(header)} columns: put a cell with a comma "
                    "in quotes, and write numbers with a decimal point"
                )
        return cls(path, header, rows)

    def column(self, name: str) -> list[str]:
        """The cells of a column without white space around them, "" where a row has none.

        Raises:
            UsageError: there is no such column, or more than one.
        """
        if name not in self.header:
            cut = [column for column in self.header if column.startswith(f"{name},")]
            quoted = f" (one with a comma goes in double quotes: '\"{cut[0]}\"')" if cut else ""
            raise UsageError(
                f"{self.path} has no column {name!r}: name one of its columns, {listed(self.header)}{quoted}"
            )
        if self.header.count(name) > 1:
            raise UsageError(f"{self.path} has more than one column {name!r}: rename one of them")
        return [cell.strip() for cell in self._cells(self.header.index(name))]

    def structures(self, name: str | None, option: str) -> list[str]:
        """The structure of each row, mostly a SMILES: of the column named, or of the one whose name says so.

        Raises:
            UsageError: there is none; it is to be named with `option`. Or one is named in an SDF.
        """
        if self.sdf is not None:
            if name is not None:
                raise UsageError(
                    f"{self.path}: no column {name!r}: structures of an SDF come from its mol blocks; leave {option} "
                    "out"
                )
            return self.sdf.structures
        index = structure_index(self.path, self.header, name, option)
        return [structure_text(cell) for cell in self._cells(index)]

    def ids(self, name: str | None) -> list[str]:
        """The id of each row: of the column named, or of the one whose name says so; else the number of the row.

        Raises:
            UsageError: there is no such column, or more than one.
        """
        if self.sdf is not None and name is None:
            cells = self.sdf.ids
        else:
            index = id_index(self.path, self.header, name, default=find(self.header, ID_HEADERS))
            cells = [""] * len(self.rows) if index is None else self._cells(index)
        return [cell.strip() or str(row) for row, cell in enumerate(cells)]

    def labels(self, name: str) -> NDArray[np.float64]:
        """The cells of a column as numbers; NaN where there is none: an empty cell, or one that says so. True is 1.

        Raises:
            UsageError: there is no such column, or one of its cells is something else.
        """
        return np.array([self._number(name, number, text) for number, text in enumerate(self.column(name), start=1)])

    def _cells(self, index: int) -> list[str]:
        return [row[index] if index < len(row) else "" for row in self.rows]

    def _number(self, column: str, row: int, text: str) -> float:
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        try:
            value = math.inf if "_" in text else float(text)  # to Python, 1_0 is a number
        except ValueError:
            value = math.inf
        if math.isfinite(value):
            return value
        raise UsageError(
            f"{self.path} has the label {text[:40]!r} in row {row} of column {column!r}: expected a number, 0 or 1 for "
            f"two classes, or an empty cell; {_mend(text)}"
        )


def _mend(text: str) -> str:
    """What to do about a label that is no number."""
    if text[0] in "<>≤≥~":
        return "empty the cells that only bound a value, or make two classes of it"
    if text.endswith("%"):
        return "write percentages without their sign"
    if re.fullmatch(r"[+-]?\d+,\d+", text):
        return "write numbers with a decimal point"
    if text[0].isalpha():
        return "write 1 and 0 for the names of two classes, or name another column"
    return "name another column"
