"""Which column of a table holds the structure, and which the id."""

import re
from collections.abc import Sequence

from data_pipeline.errors import UsageError

# The text of a structure (SMILES, InChI or mol block; '' where there is none), and its id or None.
Record = tuple[str, str | None]

SMILES_HEADERS = ("smiles", "canonical_smiles", "isomeric_smiles", "isosmiles", "isomericsmiles", "cxsmiles", "mol")
# Taken where there are none of these: what PubChem calls canonical SMILES has no stereo.
STRUCTURE_HEADERS = ("inchi", "standard_inchi", "molblock", "canonicalsmiles")
ID_HEADERS = (
    "id",
    "source_id",
    "name",
    "zinc_id",
    "chembl_id",
    "chembl id",
    "cid",
    "idnumber",
    "mol_id",
    "molecule_id",
)


# Its features have a colon, atom labels are between `$`, coordinates in parentheses; `r` stands alone. Other words
# between bars are ids.
_EXTENSION = re.compile(r"[ \t]\|(?:r?|[^|\n:$(]*[:$(][^|\n]*)\|(?=\s|$)")


def structure_index(path: str, header: Sequence[str], column: str | None, option: str = "--smiles-column") -> int:
    """Index of the column named `column`; without a name, of the first SMILES, else InChI or mol block column.

    Raises:
        UsageError: no such column, or more than one; or none that is found, which `option` would name.
    """
    if column is not None:
        return _named_index(path, header, column)
    # In some tables `mol` is the SMILES, in others a number beside it.
    certain = [name for name in SMILES_HEADERS if name != "mol"]
    found = (find(header, names) for names in (certain, SMILES_HEADERS, STRUCTURE_HEADERS))
    index = next((index for index in found if index is not None), None)
    if index is None:
        raise UsageError(f"{path}: no SMILES column among {listed(header)}; name it with {option}")
    return _named_index(path, header, header[index])


def id_index(path: str, header: Sequence[str], column: str | None, default: int | None) -> int | None:
    """Index of the column named `column`, `default` without a name. Raises UsageError if there is no such column."""
    return default if column is None else _named_index(path, header, column)


def structure_text(cell: str) -> str:
    """The structure in a cell: without blanks around it, and the extension of a CXSMILES; a mol block as it is."""
    text = cell.strip()
    if "\n" in text:
        return cell  # whose first line may be blank
    return without_extension(text) if " |" in text else text


def without_extension(text: str) -> str:
    """A CXSMILES (`C[C@H](N)O |&1:1|`) or a line with one, without the extension between bars."""
    return _EXTENSION.sub("", text, count=1).rstrip()


def find(header: Sequence[str], names: Sequence[str]) -> int | None:
    """Index of the first column with one of the lower-case `names`, in upper or lower case."""
    return next((index for index, name in enumerate(header) if name.lower() in names), None)


def format_of_header(line: str, column: str | None = None) -> str | None:
    """The format, csv or tsv, as whose header a line has the name `column` or one of a structure; None for neither."""
    for delimiter, form in ((",", "csv"), (";", "csv"), ("\t", "tsv")):
        names = [name.strip(' "') for name in line.split(delimiter)]
        if len(names) > 1 and (column in names or find(names, (*SMILES_HEADERS, *STRUCTURE_HEADERS)) is not None):
            return form
    return None


def listed(header: Sequence[str]) -> str:
    """The names of columns, for a message."""
    return ", ".join(ascii(name[:40]) for name in header[:20])


def _named_index(path: str, header: Sequence[str], column: str) -> int:
    if column not in header:
        raise UsageError(f"{path}: no column {column!r}; the file's columns are {listed(header)}")
    if header.count(column) > 1:
        raise UsageError(f"{path}: more than one column {column!r}: rename one of them")
    return header.index(column)
