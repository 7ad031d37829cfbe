"""SDF, as PubChem and ChEMBL give it out, V2000 or V3000, as a stream of records.

The text of a record is its mol block, to `M  END`. A record without that line, or at the end of a truncated file, or of
absurd length, is a record too, whose text no parser accepts. So is one with two molecules, as the line `$$$$` between
them is missing: properties of one would be taken for those of the other.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import BinaryIO, NamedTuple

from data_pipeline.errors import UsageError
from data_pipeline.sources.columns import Record, listed
from data_pipeline.sources.lines import decoded, text_blocks
from data_pipeline.sources.streams import open_stream

# Properties that hold the id of a record, in the SDF of PubChem, ChEMBL, ChEBI, ZINC, Enamine and DrugBank.
ID_PROPERTIES = (
    "PUBCHEM_COMPOUND_CID",
    "PUBCHEM_SUBSTANCE_ID",
    "chembl_id",
    "ChEBI ID",
    "zinc_id",
    "Catalog ID",
    "idnumber",
    "DRUGBANK_ID",
)

# Bytes. What follows in a longer record is dropped.
MAX_RECORD_LENGTH = 4 << 20

_DELIMITER = b"\n$$$$"
# The line before the value of a property: `> 25 <NAME> (ID)`, whose name may have brackets in it, too.
_BEFORE_NAME = rb">(?:[ \t][^\n<]*)?<"
_PROPERTY = re.compile(rb"\n" + _BEFORE_NAME + rb"([^\n]*)>[^\n>]*")
# With the first line of its value, which may be missing before the next property.
_NAME_AND_VALUE = re.compile(_PROPERTY.pattern + rb"(?:\n(?!" + _BEFORE_NAME + rb"[^\n]*>)([^\n]*))?")
# A mol block that begins behind another one, or behind an empty line, and not as the value of a property.
_NEXT_MOL_BLOCK = re.compile(rb"\n(?:M  END[^\n]*|[ \t\r]*)\n(?:[^\n]*\n){3}[ \d]{6}[^\n]*V[23]000")
# Records in which a property must occur to be a column: one that lacks it is not the mistake of a name.
_HEAD_RECORDS = 20


@contextmanager
def open_sdf(path: str, smiles_column: str | None, id_column: str | None) -> Iterator[Iterator[Record]]:
    """Records of an SDF. The id is the property `id_column`; without a name, one of `ID_PROPERTIES`, else the title.

    Raises:
        UsageError: no such file; a `smiles_column`; a property that no record at the beginning has.
        PipelineError: the file is damaged or UTF-16; while iterating, too.
    """
    if smiles_column is not None:
        raise UsageError(
            f"{path}: no column {smiles_column!r}: structures of an SDF come from its mol blocks; prepare it without "
            "--smiles-column (other files can be added with --append)"
        )
    with open_stream(path) as stream:
        records = _records(path, stream)
        head = list(islice(records, _HEAD_RECORDS))
        if id_column is None:
            yield _read(chain(head, records), ID_PROPERTIES, title=True)
            return
        names = list(dict.fromkeys(decoded(name) for record in head for name in _PROPERTY.findall(record)))
        if head and id_column not in names:
            raise UsageError(f"{path}: no property {id_column!r}; the first records have {listed(names) or 'none'}")
        yield _read(chain(head, records), (id_column,), title=False)


class SdfTable(NamedTuple):
    """An SDF as a table.

    Attributes:
        structures: the mol block of each record, as `open_sdf` gives it.
        ids: its id, likewise; "" for one that has none.
        header: names of the properties, one of them again where a record has it with several values.
        rows: the values of each record, of which the first line counts; "" for a property that it has not.
    """

    structures: list[str]
    ids: list[str]
    header: list[str]
    rows: list[list[str]]


def read_sdf_table(path: str) -> SdfTable:
    """All of an SDF.

    Raises:
        UsageError: no such file; no record has a property; a record is so long that properties were dropped.
        PipelineError: the file is damaged or UTF-16.
    """
    with open_stream(path) as stream:
        records = list(_records(path, stream))
    for number, record in enumerate(records, start=1):
        if len(record) >= MAX_RECORD_LENGTH:
            raise UsageError(
                f"{path}: record {number} is longer than {MAX_RECORD_LENGTH >> 20} MiB, of which a table would lack "
                "what follows: shorten its properties"
            )
    properties = [_properties(record) for record in records]
    names = list(dict.fromkeys(name for found in properties for name in found))
    if not names:
        raise UsageError(f"{path}: none of its {len(records)} records has a property, and labels are properties")
    first = list(_read(iter(records), ID_PROPERTIES, title=True))
    return SdfTable(
        [text for text, _ in first],
        [record_id or "" for _, record_id in first],
        [name for name, _ in names],
        [[found.get(name, "") for name in names] for found in properties],
    )


def _properties(record: bytes) -> dict[tuple[str, int], str]:
    """Values of a record by the name of the property and how many other values it had before."""
    found: dict[tuple[str, int], str] = {}
    for raw_name, raw_value in _NAME_AND_VALUE.findall(record, _end_of_mol_block(record)):
        name, value = decoded(raw_name), decoded(raw_value).strip()
        if value:
            place = next(place for place in count() if found.get((name, place), "") in ("", value))
            found[name, place] = value
        else:
            found.setdefault((name, 0), "")
    return found


def _records(path: str, stream: BinaryIO) -> Iterator[bytes]:
    """The records of an SDF, without the `$$$$` lines between them, each of at most `MAX_RECORD_LENGTH` bytes."""
    # What is not a whole record yet, from the end of the delimiter line before it.
    rest = b"\n"
    for block in text_blocks(path, stream):
        *pieces, rest = (rest + block).split(_DELIMITER)
        for piece in pieces:
            yield _content(piece)
        if len(rest) > MAX_RECORD_LENGTH:
            # A delimiter may have begun at the end.
            rest = rest[:MAX_RECORD_LENGTH] + b" " + rest[-len(_DELIMITER) :]
    last = _content(rest)
    if last and not last.isspace():
        yield last


def _content(piece: bytes) -> bytes:
    _, _, record = piece.partition(b"\n")
    return record[:MAX_RECORD_LENGTH]


def _read(records: Iterator[bytes], properties: tuple[str, ...], title: bool) -> Iterator[Record]:
    names = b"|".join(re.escape(name.encode()) for name in properties)
    value = re.compile(rb"\n>[^\n]*<(?:" + names + rb")>[^\n]*\n([^\n]*)")
    for record in records:
        end = _end_of_mol_block(record)
        found = value.search(record, end)
        record_id = found[1] if found else record.partition(b"\n")[0] if title else b""
        yield _text(record[: _whole_end(record, end)]), decoded(record_id).strip() or None


def _whole_end(record: bytes, end: int) -> int:
    """Where the text of a record ends, whose mol block ends at `end`: before its last line if another one follows."""
    last_line = record.rfind(b"\nM  END", 0, end)
    if last_line < 0 or record.find(b"\nM  END", end) < 0 or not _NEXT_MOL_BLOCK.search(record, last_line):
        return end
    return last_line


def _end_of_mol_block(record: bytes) -> int:
    """Where the line `M  END` ends; without it, where the properties begin."""
    end = record.find(b"\nM  END")
    end = record.find(b"\n>") if end < 0 else record.find(b"\n", end + 1)
    return end if end >= 0 else len(record)


def _text(mol_block: bytes) -> str:
    # With a line break even if it is a single line, which tells it from a SMILES.
    return "" if not mol_block or mol_block.isspace() else decoded(mol_block) + "\n"
