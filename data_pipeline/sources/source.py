"""What the user names as SOURCE -> files with a checksum -> chunks of rows."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from rdkit import RDConfig

from data_pipeline.errors import UsageError
from data_pipeline.keys import digest128
from data_pipeline.redact import without_credentials
from data_pipeline.remote import is_url, stamp
from data_pipeline.schema import ID_LIMIT, storable
from data_pipeline.sources.columnar import open_columnar
from data_pipeline.sources.columns import Record
from data_pipeline.sources.formats import HEAD_BYTES, SYNTH, check_format, check_no_archive, detect_format
from data_pipeline.sources.locate import Location, locate
from data_pipeline.sources.provenance import licence_note
from data_pipeline.sources.sdf import open_sdf
from data_pipeline.sources.streams import file_name, read_head, size_and_checksum, size_of
from data_pipeline.sources.synth import is_synth, parse_synth, synthesize
from data_pipeline.sources.tables import open_delimited, open_smiles

NCI5K = "nci5k"
_NCI5K_PATH = os.path.join(RDConfig.RDDataDir, "NCI", "first_5K.smi")

DEFAULT_CHUNK_ROWS = 4096
# A chunk of long texts is closed earlier, so that memory stays bounded: encoding takes 75 to 115 bytes for each
# character of a SMILES. An atom has many more characters in a mol block.
CHUNK_CHARACTERS = 2 << 20
_MOLBLOCK_CHARACTERS = 8


@dataclass(frozen=True)
class Source:
    """One input: a file, or a synthetic library.

    name: as manifest and rejects name it, what is not UTF-8 escaped; path: where it lies, on this machine or as a URL,
    or the name of the library; format: one of `formats.FORMATS`, or "synth"; bytes: as stored, 0 for a library;
    blake2b: of these bytes, or of what the library follows from, 128 bits, hexadecimal; licence: a note on its terms;
    stamp: of an object behind a URL, what changes when it does.
    """

    name: str
    path: str
    format: str
    bytes: int
    blake2b: str
    licence: str | None = None
    stamp: str = ""

    def renamed(self, taken: set[str]) -> "Source":
        """This source under its path, numbered if need be, when its name is among those `taken`."""
        path = _name_of_path(self.path)
        names = (self.name, path, *(f"{path}#{number}" for number in range(2, len(taken) + 3)))
        return dataclasses.replace(self, name=next(name for name in names if name not in taken))


@dataclass(frozen=True)
class SourceChunk:
    """Consecutive rows of one source: `texts[i]` and `ids[i]` are of data row `first_row + i`.

    A text is a SMILES, an InChI, or a mol block, which alone has line breaks; '' where the row has none. A text that is
    not UTF-8 holds lone surrogates. A row without an id gets its row number. A header is not counted.
    """

    first_row: int
    texts: list[str]
    ids: list[str]


def resolve_sources(names: Sequence[str], format: str | None = None, checksums: bool = True) -> list[Source]:
    """What is behind paths, URLs, patterns, folders of `datasets` and the names `nci5k` and `synth:N`, in this order.

    The files of a pattern are in alphabetical order, those of a folder in the order of its rows. `format` is the format
    of all files; without it, each tells its own (`formats.detect_format`). Without `checksums` only the heads of files
    are read, and `blake2b` is ''.

    Raises:
        UsageError: nothing there, a folder that `datasets` did not write, an archive, a format that is not known or
            not told.
        PipelineError: the storage cannot be read; a file is not compressed as its name says.
    """
    if format is not None:
        check_format(format)
    sources = [source for name in names for source in _resolve(name, format, checksums)]
    uses = Counter(source.name for source in sources)
    # Rejects name their source: where two files have the same name, it takes their paths to tell them apart.
    return [dataclasses.replace(s, name=_name_of_path(s.path)) if uses[s.name] > 1 else s for s in sources]


def read_chunks(
    source: Source,
    smiles_column: str | None = None,
    id_column: str | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Iterator[SourceChunk]:
    """All rows of a source, in order, at most `chunk_rows` at a time.

    `smiles_column`, `id_column`: names in the header of a table, found by themselves when None (`columns`); in an SDF,
    the id's property.

    Raises:
        UsageError: a column that is not there, a file that is there no more.
        PipelineError: a file that is truncated, damaged or out of reach.
    """
    with _open_records(source, smiles_column, id_column) as records:
        texts: list[str] = []
        ids: list[str] = []
        characters = 0
        first_row = 0
        for text, record_id in records:
            ids.append(_stored_id(record_id) if record_id else str(first_row + len(texts)))
            texts.append(text)
            characters += (len(text) // _MOLBLOCK_CHARACTERS if "\n" in text else len(text)) + len(ids[-1])
            if len(texts) == chunk_rows or characters >= CHUNK_CHARACTERS:
                yield SourceChunk(first_row, texts, ids)
                first_row += len(texts)
                texts, ids, characters = [], [], 0
        if texts:
            yield SourceChunk(first_row, texts, ids)


def _stored_id(record_id: str) -> str:
    """At most `ID_LIMIT` bytes of an id, as UTF-8 text."""
    content = storable(record_id[:ID_LIMIT]).encode()
    return content[:ID_LIMIT].decode("utf-8", "ignore")


def check_columns(source: Source, smiles_column: str | None, id_column: str | None) -> None:
    """Read the head of a source, so that a mistake shows before the work starts. Raises as `read_chunks`."""
    with _open_records(source, smiles_column, id_column):
        pass


def _open_records(
    source: Source, smiles_column: str | None, id_column: str | None
) -> AbstractContextManager[Iterator[Record]]:
    path, columns = source.path, (smiles_column, id_column)
    match source.format:
        case "smiles":
            return open_smiles(path, *columns)
        case "id-smiles":
            return open_smiles(path, *columns, id_first=True)
        case "csv":
            return open_delimited(path, ",", *columns)
        case "tsv":
            return open_delimited(path, "\t", *columns)
        case "sdf":
            return open_sdf(path, *columns)
        case "parquet" | "arrow" as kind:
            return open_columnar(path, kind, *columns)
        case _:
            return _open_synth(path, *columns)


def _open_synth(
    name: str, smiles_column: str | None, id_column: str | None
) -> AbstractContextManager[Iterator[Record]]:
    for column in (smiles_column, id_column):
        if column is not None:
            raise UsageError(f"{name}: no column {column!r}: a synthetic library has no columns")
    return nullcontext(synthesize(parse_synth(name)))


def _resolve(name: str, form: str | None, checksums: bool) -> list[Source]:
    if name == NCI5K:
        return [_source(Location(NCI5K, _NCI5K_PATH), None, checksums)]
    if is_synth(name):
        spec = parse_synth(name)
        normal = f"synth:{spec.count}?seed={spec.seed}"
        checksum = digest128(spec.identity.encode()).hex()
        return [Source(normal, normal, SYNTH, 0, checksum, licence_note(normal, normal))]
    return [_source(location, form, checksums) for location in locate(name, form)]


def _name_of_path(path: str) -> str:
    return storable(without_credentials(path))


def _source(location: Location, form: str | None, checksums: bool) -> Source:
    # A file's name may be any bytes.
    name, path = storable(location.name), location.path
    head = read_head(path, HEAD_BYTES)
    check_no_archive(path, head)
    form = form or detect_format(path, file_name(path), head)
    mark = stamp(path) if is_url(path) else ""
    size, checksum = size_and_checksum(path) if checksums else (size_of(path), "")
    return Source(name, path, form, size, checksum, licence_note(name, without_credentials(path)), mark)
