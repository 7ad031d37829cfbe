"""A user's table of molecules: a CSV file with a header, its cells as text, its labels as numbers."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.columns import SMILES_HEADERS, find, listed
from data_pipeline.errors import PipelineError, UsageError
from data_pipeline.lines import MAX_LINE_LENGTH, read_lines
from data_pipeline.streams import open_stream

# What a cell without a label may say, in lower case.
MISSING = {"", "na", "n/a", "nan", "none", "null"}
_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Table:
    """The cells of a table.

    Args:
        path: where it was read, for messages.
        header: names of the columns.
        rows: cells of each row, without white space around them; a row may be shorter than the header.
    """

    path: str
    header: list[str]
    rows: list[list[str]]

    @classmethod
    def read(cls, path: str) -> Table:
        """The table at a path or URL, of commas, semicolons or tabs, perhaps compressed. An empty line is an empty row.

        Raises:
            UsageError: no such file, two columns of one name, a row with more cells than there are columns.
            PipelineError: it cannot be read.
        """
        # Global to the process, and only ever raised.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_LENGTH))
        with open_stream(path) as stream:
            lines = read_lines(path, stream)
            first = next(lines, "")
            delimiter = max(_DELIMITERS, key=first.count)
            header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
            reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
            try:
                rows = [[cell.strip() for cell in row] for row in reader]
            except csv.Error as error:
                raise PipelineError(
                    f"{path} cannot be read as a table ({error}): write it anew as a CSV file"
                ) from error
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise UsageError(f"{path} has more than one column {listed(sorted(twice))}: rename one of them")
        for number, row in enumerate(rows, start=1):
            if any(row[len(header) :]):
                raise UsageError(
                    f"{path} has {len(row)} cells in row {number}, and {len(header)} columns: put a cell with a comma "
                    "in quotes, and write numbers with a decimal point"
                )
        return cls(path, header, rows)

    def column(self, name: str) -> list[str]:
        """The cells of a column, "" where a row has none.

        Raises:
            UsageError: there is no such column.
        """
        if name not in self.header:
            raise UsageError(f"{self.path} has no column {name!r}: name one of its columns, {listed(self.header)}")
        index = self.header.index(name)
        return [row[index] if index < len(row) else "" for row in self.rows]

    def smiles(self, name: str | None, option: str) -> list[str]:
        """The cells of the column of SMILES: the one named, or the one whose name says so.

        Raises:
            UsageError: there is none; it is to be named with `option`.
        """
        if name is not None:
            return self.column(name)
        index = find(self.header, SMILES_HEADERS)
        if index is None:
            raise UsageError(f"{self.path} has no SMILES column among {listed(self.header)}: name it with {option}")
        return self.column(self.header[index])

    def labels(self, name: str) -> NDArray[np.float64]:
        """The cells of a column as numbers; NaN where there is none: an empty cell, or one that says so.

        Raises:
            UsageError: there is no such column, or one of its cells is something else.
        """
        return np.array([self._number(name, number, text) for number, text in enumerate(self.column(name), start=1)])

    def _number(self, column: str, row: int, text: str) -> float:
        if text.lower() in MISSING:
            return math.nan
        try:
            value = math.inf if "_" in text else float(text)  # to Python, 1_0 is a number
        except ValueError:
            value = math.inf
        if math.isfinite(value):
            return value
        raise UsageError(
            f"{self.path} has the label {text[:40]!r} in row {row} of column {column!r}: expected a number, 0 or 1 for "
            "two classes, or an empty cell; name another column"
        )
