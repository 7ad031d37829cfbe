"""What the user names as SOURCE -> files with a checksum -> chunks of rows."""

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rdkit import RDConfig

from data_pipeline.errors import UsageError
from data_pipeline.keys import file_checksum
from data_pipeline.schema import storable
from data_pipeline.tables import open_records

NCI5K = "nci5k"
_NCI5K_PATH = os.path.join(RDConfig.RDDataDir, "NCI", "first_5K.smi")
_NCI5K_LICENCE = "5,000 NCI molecules shipped with RDKit (BSD-3-Clause)"

DEFAULT_CHUNK_ROWS = 4096
# A chunk of absurdly long lines is closed earlier, so that memory stays bounded.
_CHUNK_CHARACTERS = 16 << 20


@dataclass(frozen=True)
class Source:
    """One input file. `blake2b`: 128 bits, hexadecimal."""

    name: str
    path: str
    format: str
    bytes: int
    blake2b: str
    licence: str | None = None

    def renamed(self, taken: set[str]) -> "Source":
        """This source under its path, numbered if need be, when its name is among those `taken`."""
        names = (self.name, self.path, *(f"{self.path}#{number}" for number in range(2, len(taken) + 3)))
        return dataclasses.replace(self, name=next(name for name in names if name not in taken))


@dataclass(frozen=True)
class SourceChunk:
    """Consecutive rows of one source: `texts[i]` and `ids[i]` are of data row `first_row + i`.

    A header is not counted. A row without an id gets its row number. A text that is not UTF-8 holds lone surrogates.
    """

    first_row: int
    texts: list[str]
    ids: list[str]


def resolve_sources(names: Sequence[str], format: str | None = None) -> list[Source]:
    """The files behind paths, globs and the name `nci5k`, in the order given; a glob's in alphabetical order.

    Raises:
        UsageError: nothing there.
    """
    sources = [source for name in names for source in _resolve(name)]
    uses = Counter(source.name for source in sources)
    # Rejects name their source: where two files have the same name, it takes their paths to tell them apart.
    return [dataclasses.replace(s, name=s.path) if uses[s.name] > 1 else s for s in sources]


def read_chunks(
    source: Source,
    smiles_column: str | None = None,
    id_column: str | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Iterator[SourceChunk]:
    """All rows of a source, in order, at most `chunk_rows` at a time.

    Raises:
        UsageError, PipelineError: as `tables.open_records`.
    """
    with open_records(source.path, smiles_column, id_column) as records:
        texts: list[str] = []
        ids: list[str] = []
        characters = 0
        first_row = 0
        for text, record_id in records:
            ids.append(storable(record_id) if record_id else str(first_row + len(texts)))
            texts.append(text)
            characters += len(text) + len(ids[-1])
            if len(texts) == chunk_rows or characters >= _CHUNK_CHARACTERS:
                yield SourceChunk(first_row, texts, ids)
                first_row += len(texts)
                texts, ids, characters = [], [], 0
        if texts:
            yield SourceChunk(first_row, texts, ids)


def check_columns(source: Source, smiles_column: str | None, id_column: str | None) -> None:
    """Read a source's header, so that a mistake shows before the work starts. Raises as `read_chunks`."""
    with open_records(source.path, smiles_column, id_column):
        pass


def _resolve(name: str) -> list[Source]:
    if name == NCI5K:
        return [_source(NCI5K, _NCI5K_PATH, _NCI5K_LICENCE)]
    # A file whose name holds a bracket is a file first, and a pattern second.
    paths = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
    if not paths:
        raise UsageError(f"{name}: no such file; expected a path, a glob pattern or {NCI5K!r}")
    return [_source(os.path.basename(path), path) for path in paths]


def _source(name: str, path: str, licence: str | None = None) -> Source:
    if not os.path.isfile(path):
        raise UsageError(f"{path}: not a file; name the files in it, as in {os.path.join(path, '*.smi')}")
    try:
        return Source(name, path, "smi", os.path.getsize(path), file_checksum(path), licence)
    except OSError as error:
        raise UsageError(f"{path}: cannot read the file: {error.strerror}") from error
